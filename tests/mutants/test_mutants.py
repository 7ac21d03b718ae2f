from __future__ import annotations

import pytest
from mutant import Mutant, Tree, all_mutants, died, red_test

from rooms import ROOT

MUTANTS = all_mutants()
FIRST = {op: mutant for op, mutant in reversed(MUTANTS)}
ALWAYS = [FIRST[op] for op in sorted(FIRST)[::5]]  # the others only with --sweep: each costs a build


def case(op: str, mutant: Mutant):
    marks = () if any(mutant is each for each in ALWAYS) else (pytest.mark.sweep,)
    return pytest.param(op, mutant, id=f"{op}: {mutant}", marks=marks)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Tree:
    return Tree(tmp_path_factory.mktemp("tree"))


def test_every_mutant_fits():
    for _, mutant in MUTANTS:
        found = (ROOT / mutant.file).read_text().count(mutant.old)
        assert found == 1, f"{mutant.file} has changed: expected once, found {found} times\n{mutant.old}"


@pytest.mark.parametrize("op, mutant", [case(*each) for each in MUTANTS])
def test_turns_a_test_red(tree: Tree, op: str, mutant: Mutant):
    broken = tree.root / mutant.file
    sound = (ROOT / mutant.file).read_text()
    broken.write_text(sound.replace(mutant.old, mutant.new))
    try:
        if mutant.build:
            tree.build(op, mutant.build)
        done = tree.test(op, mutant, tree.root)
    finally:
        broken.write_text(sound)
    assert done.returncode != 0, f"no test noticed\n{done.stdout[-2000:]}"
    red = red_test(done.stdout)
    if mutant.sanitize:
        report = done.stdout + done.stderr
        assert "Sanitizer" in report or "runtime error" in report, report[-2000:]
    elif not died(done):
        assert red, f"pytest ended without a red test\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert tree.test(op, mutant, ROOT, red).returncode == 0, f"{red} is red in the sound tree too"
