"""LoRA, DoRA, IA3, prompt and prefix tuning, QLoRA: attached, trained, saved as `peft` folders, merged."""
