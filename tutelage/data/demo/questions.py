"""`python-questions:`: questions and answers about Python's standard library, made from its own docstrings.

An answer is what the docstring says: its first sentence, its module, its signature. Nothing is rephrased, so nothing is
invented. Two held-out parts tell two things apart: `seen_function_new_phrasing` asks about functions of the training part
in words never used there; `unseen_function` asks about functions of which no question was trained on.
"""

from __future__ import annotations

import builtins
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tutelage.data.clean.split import TRAIN, VALIDATION, position
from tutelage.data.demo import python_docs
from tutelage.data.demo.python_docs import LICENCE, Entry, Module
from tutelage.errors import ConfigError
from tutelage.records import Conversation, Message

ANSWER_CHARS = (15, 160)
UNSEEN_SHARE = 0.05  # functions held out whole
NEW_PHRASING_SHARE = 0.3  # facts of seen functions that are also asked in held-out words
BUILTINS = frozenset(dir(builtins))
# What newcomers ask about comes first; other modules fill up to `functions`.
MODULES = """
    os.path os shutil glob pathlib tempfile textwrap string re json csv random statistics fractions collections heapq bisect
    functools operator copy datetime calendar typing dataclasses enum abc contextlib types inspect traceback logging argparse
    getopt configparser subprocess threading queue socket ssl urllib.parse urllib.request http.client http.server html base64
    hashlib hmac secrets uuid gzip bz2 lzma zipfile tarfile pickle shelve sqlite3 struct codecs io fnmatch filecmp fileinput
    linecache difflib keyword token tokenize ast dis timeit cProfile pdb unittest doctest warnings weakref numbers decimal
    locale gettext getpass platform signal sched selectors asyncio mimetypes imaplib smtplib ftplib ipaddress plistlib
    email.message email.utils xml.etree.ElementTree graphlib zoneinfo importlib pkgutil pprint reprlib
"""
WELL_KNOWN = {name: rank for rank, name in enumerate(MODULES.split())}
# The last phrasings of each task are never trained on: they ask about seen functions in new words.
PHRASINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "what_does": (
        ("What does {full} do?", "What is {full} for?", "Explain {full}.", "What does `{full}` do?", "Tell me what {full} does."),
        ("Can you explain what {full} does?", "What is the purpose of {full}?"),
    ),
    "what_is": (
        ("What is {full}?", "What is {full} for?", "Explain {full}.", "What is the class {full}?", "Tell me about {full}."),
        ("Can you explain what {full} is?", "What is the purpose of {full}?"),
    ),
    "which_module": (
        ("Which module has {name}?", "Which module has the {kind} {name}?", "In which module is {name}?", "Where is {name}?"),
        ("What module is {name} in?", "Which module should I import for {name}?"),
    ),
    "signature": (
        ("What arguments does {full} take?", "How do I call {full}?", "What is the signature of {full}?"),
        ("Which parameters does {full} have?", "Show me how {full} is called."),
    ),
    "module": (
        ("What is the module {full} for?", "What is {full}?", "What does the module {full} do?", "Tell me about {full}."),
        ("What is the purpose of the module {full}?", "When would I use {full}?"),
    ),
}


@dataclass(slots=True, frozen=True)
class Fact:
    """One thing to know about one function, class or module."""

    task: str
    family: str  # full name of what it is about
    answer: str
    names: dict[str, str]  # fills the phrasings
    parent: str  # id of the document that says so


def read(parameters: Mapping[str, str]) -> Iterator[Conversation]:
    """Conversations of a `python-questions:?functions=900&phrasings=3&seed=0` source.

    `functions`: how many functions, classes and methods are asked about; `phrasings`: training questions for each
    fact. Raises `ConfigError` for an unknown or senseless parameter.
    """
    values = {"functions": 900, "phrasings": 3, "seed": 0}
    for key, text in parameters.items():
        if key not in values:
            raise ConfigError("unknown parameter of python-questions:", found=key, expected=", ".join(values))
        if not text.isdigit():
            raise ConfigError("not a whole number", field=f"python-questions:?{key}", found=text, expected="1, 2, 3, …")
        values[key] = int(text)
    return conversations(values["functions"], values["phrasings"], values["seed"])


def conversations(functions: int = 900, phrasings: int = 3, seed: int = 0) -> Iterator[Conversation]:
    """Questions about every fact, in the order of the facts; both sides of the split, marked in `meta`."""
    for number, fact in enumerate(facts(functions, seed), 1):
        trained, held_out = PHRASINGS[fact.task]
        unseen = position(f"unseen {fact.family}", seed) < UNSEEN_SHARE
        if unseen:
            yield _conversation(fact, number, _pick(trained, 1, fact, seed)[0], VALIDATION, "unseen_function")
            continue
        for phrasing in _pick(trained, phrasings, fact, seed):
            yield _conversation(fact, number, phrasing, TRAIN, "train")
        if position(f"asked anew {fact.task} {fact.family}", seed) < NEW_PHRASING_SHARE:
            yield _conversation(fact, number, _pick(held_out, 1, fact, seed)[0], VALIDATION, "seen_function_new_phrasing")


def _pick(phrasings: tuple[str, ...], count: int, fact: Fact, seed: int) -> list[str]:
    return sorted(phrasings, key=lambda p: position(f"{p} {fact.task} {fact.family}", seed))[:count]


def _conversation(fact: Fact, number: int, phrasing: str, split: str, split_kind: str) -> Conversation:
    turns = [Message(role="user", content=phrasing.format(**fact.names)), Message(role="assistant", content=fact.answer)]
    meta = {"task": fact.task, "answer": fact.answer, "family": fact.family, "split": split, "split_kind": split_kind}
    source = f"python-questions:{fact.family}#{number}"
    return Conversation.make(turns, source=source, parents=(fact.parent,), licence=LICENCE, meta=meta)


def facts(functions: int, seed: int = 0) -> list[Fact]:
    """What can be asked about the chosen functions and their modules, well-known modules first.

    Which module a name is in is asked only where no other module, class or builtin has that name.
    """
    public = [m for m in python_docs.modules() if not any(p.startswith("_") for p in m.name.split("."))]
    chosen: list[tuple[Module, Entry]] = []
    for module in sorted(public, key=lambda m: (WELL_KNOWN.get(m.name, len(WELL_KNOWN)), m.name)):
        own = [e for e in module.entries if is_public(e, module) and first_sentence(e.doc)]
        own = sorted(own, key=lambda e: (e.kind == "method", position(e.full_name, seed)))
        chosen += [(module, e) for e in own[:40]]  # no module fills the list alone
    chosen = chosen[:functions]
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for module in public:
        for entry in module.entries:
            owners[entry.name.rpartition(".")[2]].add(entry.full_name.rpartition(".")[0])
    parents = {name: python_docs.module_document(m).id for name, m in {m.name: m for m, _ in chosen}.items()}
    out: list[Fact] = []
    asked: set[str] = set()
    for module, entry in chosen:
        parent = parents[module.name]
        if module.name not in asked and (sentence := first_sentence(module.doc)):
            out.append(Fact("module", module.name, sentence, {"full": module.name}, parent))
        asked.add(module.name)
        out += _facts_of(entry, parent, unique=owners[entry.name] == {module.name} and entry.name not in BUILTINS)
    first: dict[str, Fact] = {}  # a property and its setter, a function and its fallback: the first one answers
    for fact in out:
        first.setdefault(PHRASINGS[fact.task][1][0].format(**fact.names), fact)
    return list(first.values())


def _facts_of(entry: Entry, parent: str, *, unique: bool) -> Iterator[Fact]:
    names = {"full": entry.full_name, "name": entry.name, "kind": entry.kind}
    sentence = first_sentence(entry.doc)
    yield Fact("what_is" if entry.kind == "class" else "what_does", entry.full_name, sentence, names, parent)
    if unique and entry.kind != "method":
        yield Fact("which_module", entry.full_name, entry.module, names, parent)
    arguments = entry.signature[entry.signature.find("(") :] if "(" in entry.signature else ""
    if entry.kind == "function" and len(arguments) > 2 and len(arguments) + len(entry.full_name) <= 90:
        yield Fact("signature", entry.full_name, f"{entry.full_name}{arguments}", names, parent)


def is_public(entry: Entry, module: Module) -> bool:
    """Whether users are meant to know it: no private part in its name, and exported where the module says what it exports."""
    parts = entry.name.split(".")
    exported = module.exported is None or parts[0] in module.exported
    return exported and not any(p.startswith("_") for p in parts) and not any(p.startswith(("test_", "visit_")) for p in parts)


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring, with a full stop; empty where it is no plain sentence of a fitting length."""
    paragraph = " ".join(doc.split("\n\n", 1)[0].split())
    match = re.match(r"(.+?[.!?])(?=\s+[A-Z(\"'`]|$)", paragraph)
    sentence = match[1] if match else paragraph
    low, high = ANSWER_CHARS
    if not low <= len(sentence) <= high or len(sentence.split()) < 3:
        return ""
    if not sentence[0].isupper() or re.search(r"\)\s*(->|=>|--)|>>>|:param|\b(i\.e|e\.g)\.$|^Copyright|^Author", sentence):
        return ""
    if sentence.endswith((":", ",", ";")):
        return ""
    return sentence if sentence[-1] in ".!?" else sentence + "."
