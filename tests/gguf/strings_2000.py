"""2,000 strings of code, digits, scripts, white space, marks and seeming special tokens; the same every time."""

from __future__ import annotations

import random


def strings(seed: int = 0, count: int = 2000) -> list[str]:
    rng = random.Random(seed)
    words = [
        "the",
        "of",
        "and",
        "model",
        "language",
        "Paris",
        "北京",
        "東京",
        "こんにちは",
        "안녕하세요",
        "Привет",
        "مرحبا",
        "שלום",
        "नमस्ते",
        "Ελληνικά",
        "naïve",
        "café",
        "don't",
        "I'll",
        "we've",
        "it's",
        "x's",
        "'S",
        "'LL",
        "straße",
        "İstanbul",
        "ﬁne",
    ]
    code = [
        "def f(x):\n    return x + 1\n",
        "for (int i = 0; i < 10; ++i) {\n\t\ta[i] += 1;\n}",
        "SELECT * FROM t WHERE a >= 3;",
        '<div class="a">\n  <p>hi</p>\n</div>',
        "x = {'a': [1, 2, 3], \"b\": None}",
        "if a != b && c || !d",
        "git commit -m 'x' --amend",
        "0x1F + 0b1010 - 1e-10",
        "http://example.org/a?b=c&d=e#f",
        "\\frac{1}{2} $x^2$ ~~~ ``` ***",
        "#include <stdio.h>\r\nint main(void) { return 0; }\r\n",
    ]
    digits = [
        "1",
        "12",
        "123",
        "1234",
        "1234567",
        "3.14159",
        "1,000,000",
        "2026-12-01",
        "10:30",
        "½",
        "²³",
        "٣٤٥",
        "一二三",
        "Ⅷ",
        "007",
        "1st",
        "v1.2.3",
        "𝟘𝟙",
        "①②",
    ]
    blanks = [
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\n\n\n",
        "\t",
        "\t\t",
        " \n",
        "\n ",
        " \n ",
        "\r\n",
        "\r",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u200b",
        "\u0085",
        "\x0b",
        "\x0c",
        "        ",
        " " * 17,
        "\n" * 7,
        "\ufeff",
        "\x1c",
        "\u1680",
        "\u180e",
    ]
    marks = [
        *".,;:!?-_'\"()[]{}<>/\\|@#$%^&*+=~`…—“”‘’«»、。！？「」",
        "...",
        "!!!",
        "->",
        "=>",
        "::",
        "'s",
        "'re",
        "\u0301",
        "e\u0301",
        "👍",
        "👩‍👩‍👧",
        "🇫🇷",
        "\x00",
        "\x7f",
        "\ud55c",
        "𠮷",
        "\U0010ffff",
        "\u2581",
        "Ġ",
        "Ċ",
        "ſ",
        "'ſ",
        "K",
    ]
    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_start",
        "im_end|>",
        "<repo_name>",
        "<file_sep>",
        "<bos>",
        "<eos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<unused0>",
        "<table>",
        "</table>",
        "[multimodal]",
        "<0x41>",
        "<unk>",
        "<pad>",
        "<s>",
        "</s>",
    ]
    pools = [words, code, digits, blanks, marks, special]
    out = []
    for i in range(count):
        pool = pools[i % 7] if i % 7 < 6 else None
        n = rng.randint(1, 12)
        parts = []
        for _ in range(n):
            source = pool if pool is not None and rng.random() < 0.6 else rng.choice(pools[:5] if pool is not special else pools)
            parts.append(rng.choice(source))
            if rng.random() < 0.4:
                parts.append(" ")
        out.append("".join(parts))
    return out
