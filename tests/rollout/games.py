"""Environments as users write them: good ones, and ones that break."""

import os
import random
import time


class Echo:
    """Says twice what it heard, then ends."""

    def __init__(self, prompt, seed):
        self.heard = []

    def reply(self, answer):
        self.heard.append(answer)
        return f"again {len(self.heard)}" if len(self.heard) < 3 else None

    def score(self):
        return float(len(self.heard))


class LastWord:
    """Worth what it heard."""

    def __init__(self, prompt, seed):
        self.heard = 0

    def reply(self, answer):
        self.heard += 1
        return "more"

    def score(self):
        return self.heard


class Dice:
    """Replies by its seed, and is worth what it threw and heard."""

    def __init__(self, prompt, seed):
        self.dice, self.worth = random.Random(seed), 0.0

    def reply(self, answer):
        thrown = self.dice.randint(1, 6)
        self.worth += thrown + len(answer)
        return None if thrown == 6 else f"threw {thrown}"

    def score(self):
        return self.worth


class Process:
    def __init__(self, prompt, seed):
        self.asked = prompt.messages[-1].content

    def reply(self, answer):
        print("printing is allowed")
        return f"{self.asked} {answer}"

    def score(self):
        return os.getpid()


class Breaks:
    """Breaks as the expected answer of its prompt says, where that says: at the start, in a reply, or in the score."""

    def __init__(self, prompt, seed):
        self.how = prompt.answer
        self.act("begin")

    def act(self, place):
        where, _, what = self.how.partition(" ")
        if where != place:
            return 1.0
        if what == "raise":
            raise ValueError("no such number")
        if what == "exit":
            raise SystemExit(3)
        if what == "end":
            os._exit(3)
        if what == "hang":
            time.sleep(60)
        return {"number": 3, "nan": float("nan"), "none": None}[what]

    def reply(self, answer):
        found = self.act("reply")
        return "go on" if found == 1.0 else found

    def score(self):
        return self.act("score")


class Half:
    def reply(self, answer):
        return None


number = 3
