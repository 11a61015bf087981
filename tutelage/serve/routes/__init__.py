"""The endpoints, a file for each group. `app.py` includes their routers."""
