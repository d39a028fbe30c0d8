"""Two hundred answers that nobody should have to be afraid of, the same ones every time."""

import random
from typing import NamedTuple

NAMES = ("project_name", "project_slug", "competition", "author")

# Each would make a file called CANARY if anything, anywhere, took it for code.
CODE = [
    "$(touch CANARY)",
    "`touch CANARY`",
    "; touch CANARY #",
    "'; open('CANARY', 'w'); '",
    '"; open("CANARY", "w"); "',
    "''' + str(open('CANARY', 'w')) + '''",
    '""" + str(open("CANARY", "w")) + """',
    "\\'''; open('CANARY', 'w') #",
    "!!python/object/apply:os.system ['touch CANARY']",
    "{{ lipsum.__globals__.os.system('touch CANARY') }}",
    "{% set x = lipsum.__globals__.os.system('touch CANARY') %}",
    "{# }} #}{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
]
PATHS = [
    "../x", "..", ".", "a/b", "a\\b", "/", "/x", "~", "~/x", "C:\\x", "\\\\server\\x", "x/..", "./x", "a/../../x",
    "x/", "//x", ".hidden", ".git", "-rf", "--help", "-", "_", "__init__", "x.", "x..y", "a:b", "con", "NUL", "com1",
    "LPT9", "Aux", "x" * 50, "x" * 51, "x" * 300, "\u00e9", "\u00df", "\uff11\uff12", "x\u00b2", "x-", "x_", "torch", "comp", "tests", "0", "007", "1e3",
]  # fmt: skip
WORDS = [
    "", " ", "   ", "plain", "Two words", "O'Neill", 'say "hi"', "back\\slash", "ends in \\", "\\", "\\\\", '"', "'",
    "'''", '"""', "a{b}c", "{", "}", "{}", "{{", "}}", "{%", "%}", "{#", "#}", "{ {", "{{}}", "{{ 7 * 7 }}", "%s %d %(x)s",
    "{0}", "${HOME}", "$HOME", "#", "# title", "key: value", "- item", "[table]", "&anchor", "*alias", "!!str", "| >", "@x",
    "true", "null", "~", "yes", "1e-3", "0x1f", "2026-11-20", "two\nlines", "\n", "cr\rlf\r\n", "tab\there", "nul\x00byte",
    "bell\x07", "esc\x1b[31mred", "del\x7f", "nel\x85", "line\u2028sep", "nbsp\xa0", "zero\u200bwidth", "rtl\u202etxt", "bom\ufeff",
    "lone\udc80", "🎉", "👨‍👩‍👧", "Łódź", "日本語", "العربية", "ñ" * 100, "x" * 101, "x" * 10_000, "<script>alert(1)</script>",
    "](http://x)", "<!-- -->", "```", "a, b", "a <b@c>", "A.B.", "end-", "-start", "UPPER", "under_score", "[/red]", "[bold]x",
]  # fmt: skip


class Answer(NamedTuple):
    name: str
    text: str
    typed: bool  # at the prompt, else as key=value


def answers(count: int = 200, seed: int = 0) -> list[Answer]:
    """Every nasty text at least once, under names and ways that a seeded draw chooses."""
    draw = random.Random(seed)
    pairs = [(draw.choice(("project_slug", "project_slug", "competition")), text) for text in PATHS]
    pairs += [("competition", "x-"), *((draw.choice(NAMES), text) for text in WORDS)]
    pairs += [(name, text) for text in CODE for name in NAMES]
    while len(pairs) < count:
        glued = "".join(draw.choice(WORDS + PATHS)[:30] for _ in range(draw.randint(2, 4)))
        pairs.append((draw.choice(NAMES), glued))
    draw.shuffle(pairs)
    typed = [
        draw.random() < 0.5 and not {"\n", "\r"} & set(text) for _, text in pairs
    ]  # Enter ends an answer
    return [Answer(*pair, by_hand) for pair, by_hand in zip(pairs, typed, strict=True)][:count]
