"""The specification and the code speak of the same rules: each rule is tested, each citation leads to a rule."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "docs" / "spec.md"
SECTIONS = {
    "S": "Shapes",
    "I": "Init",
    "G": "Generation",
    "D": "Delta",
    "M": "Merge",
    "L": "Layout",
    "F": "Files",
    "E": "Errors",
}

RULE = re.compile(r"^### ([A-Z])([1-9]\d*)\. \S", re.MULTILINE)
TEST = re.compile(r"^ *def test_([a-z])([1-9]\d*)_", re.MULTILINE)
CITATION = re.compile(r"\bspec ([A-Z][1-9]\d*(?:(?:, | and | or | to )[A-Z][1-9]\d*)*)")


def rules(text: str) -> list[str]:
    """Identifiers of the rules that a specification text states, in its order."""
    return [letter + number for letter, number in RULE.findall(text)]


def rules_of_tests(text: str) -> set[str]:
    """Rules after which the tests of a file are named."""
    return {letter.upper() + number for letter, number in TEST.findall(text)}


def cited(text: str) -> set[str]:
    """Rules that a text cites as ``spec S3`` or ``spec S3, S4 and S7``."""
    return {rule for group in CITATION.findall(text) for rule in re.findall(r"[A-Z]\d+", group)}


def sources(*patterns: str) -> list[Path]:
    """Python files of the repository that match the patterns, this file left out."""
    return [file for pattern in patterns for file in sorted(ROOT.glob(pattern)) if file != Path(__file__)]


def test_rules_are_numbered_in_order_within_known_sections():
    stated = rules(SPEC.read_text())
    assert {rule[0] for rule in stated} == set(SECTIONS)
    for letter in SECTIONS:
        numbers = [int(rule[1:]) for rule in stated if rule[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)), f"section {SECTIONS[letter]} numbers its rules {numbers}"


def test_every_rule_has_a_test_named_after_it():
    named = set().union(
        *(rules_of_tests(file.read_text()) for file in sources("packages/*/tests/**/*.py", "tests/**/*.py"))
    )
    assert not (untested := [rule for rule in rules(SPEC.read_text()) if rule not in named]), untested


def test_every_test_named_after_a_rule_names_one_that_exists():
    stated = set(rules(SPEC.read_text()))
    for file in sources("packages/hora-spec/tests/**/*.py"):
        assert not (unknown := rules_of_tests(file.read_text()) - stated), f"{file.name} tests {unknown}"


def test_code_cites_only_rules_that_exist():
    stated = set(rules(SPEC.read_text()))
    for file in sources("packages/**/*.py", "tests/**/*.py"):
        assert not (unknown := cited(file.read_text()) - stated), f"{file.relative_to(ROOT)} cites {unknown}"


def test_meta_the_patterns_find_what_they_should():
    assert rules("## Shapes\n### S1. Heads\ntext ### S9. no\n#### S8. no\n### S2. Names\n### S10. More\n") == [
        "S1",
        "S2",
        "S10",
    ]
    assert rules_of_tests("def test_s3_heads():\nclass T:\n    def test_g12_x(self):\ndef test_shapes():\n") == {
        "S3",
        "G12",
    }
    assert cited("(spec S3), spec G1, G2 and I4 to I6; see spec text and specS9") == {"S3", "G1", "G2", "I4", "I6"}
