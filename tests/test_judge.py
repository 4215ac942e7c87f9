"""How the judge tells attached models from plain ones; the judged tests themselves run in `make judge`."""

import importlib.util
import io
import sys
import tarfile
from pathlib import Path

import pytest

OUTSIDE = Path(__file__).parent / "outside"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, OUTSIDE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def judge(monkeypatch):
    """The parts of the judge that need no transformers, under their bare names for this test alone."""
    names = ("session", "comparison", "source", "judged")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: _load(name) for name in names}
    yield type("Judge", (), modules)
    for name in names:
        sys.modules.pop(name, None)


def _outcomes(judge, counted=(1, 1, 1), refused=(), **results):
    """Outcomes of one family; its first test carries what the attached models counted."""
    lynx = dict(zip(("attached", "prefill", "decode"), counted, strict=True)) | {"refused": list(refused)}
    return {
        f"TestX::test_{name}": judge.session.Outcome(result, reason, tokens, lynx if number == 0 else {})
        for number, (name, (result, reason, tokens)) in enumerate(results.items())
    }


PASSED, FAILED, SKIPPED = ("passed", "", None), ("failed", "AssertionError", None), ("skipped", "no GPU", None)


def _faults(judge, plain, attached, expected=(), again=None):
    return judge.comparison.compare(plain, attached, expected, lambda tests: again or (plain, attached)).faults


def test_the_same(judge):
    plain = _outcomes(judge, a=PASSED, b=FAILED, c=SKIPPED)
    other_words = _outcomes(judge, a=PASSED, b=("failed", "another number", None), c=SKIPPED)
    assert _faults(judge, plain, other_words) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PASSED, FAILED),
        (PASSED, SKIPPED),
        (FAILED, PASSED),
        (SKIPPED, ("skipped", "another reason", None)),
        (("passed", "", [[1]]), ("passed", "", [[2]])),
    ],
)
def test_a_difference_is_a_fault(judge, before, after):
    (fault,) = _faults(judge, _outcomes(judge, a=before, b=PASSED), _outcomes(judge, a=after, b=PASSED))
    assert fault.startswith("TestX::test_a: plain")


def test_a_test_that_is_not_there(judge):
    both, one = _outcomes(judge, a=PASSED, b=PASSED), _outcomes(judge, a=PASSED)
    assert _faults(judge, both, one) == ["TestX::test_b: plain passed, attached not there"]
    assert _faults(judge, one, both) == ["TestX::test_b: plain not there, attached passed"]


def test_what_must_differ(judge):
    plain, attached = _outcomes(judge, a=PASSED, b=PASSED), _outcomes(judge, a=PASSED, b=FAILED)
    assert _faults(judge, plain, attached, expected=["test_b"]) == []
    assert _faults(judge, plain, plain, expected=["test_b"]) == [
        "TestX::test_b: was to come out differently, and did not"
    ]


def test_what_differs_once_is_flaky(judge):
    plain, attached = _outcomes(judge, a=PASSED), _outcomes(judge, a=FAILED)
    found = judge.comparison.compare(plain, attached, (), lambda tests: (plain, plain))
    assert (found.faults, found.flaky) == ([], ["TestX::test_a"])


def test_a_judge_that_saw_nothing(judge):
    plain = _outcomes(judge, a=PASSED)
    nothing = _outcomes(judge, counted=(0, 0, 0), a=PASSED)
    assert _faults(judge, plain, nothing) == [f"nothing was counted: {k}" for k in ("attached", "prefill", "decode")]
    assert _faults(judge, plain, _outcomes(judge, refused=["X: why"], a=PASSED)) == ["not attached: X: why"]


def test_subtests_have_lines_of_their_own(judge, tmp_path):
    lines = ['{"test": "T::a [b]", "outcome": "failed", "reason": "r"}'] * 2
    lines.append('{"test": "T::a", "outcome": "failed", "reason": "r", "tokens": [], "lynx": {"attached": 2}}')
    (tmp_path / "o").write_text("\n".join(lines))
    outcomes = judge.session._read(tmp_path / "o")
    assert list(outcomes) == ["T::a [b]", "T::a [b] 2", "T::a"]
    assert judge.comparison.results(outcomes) == {"failed": 1}
    assert outcomes["T::a"].lynx == {"attached": 2}


def test_only_tests_are_unpacked(judge, tmp_path):
    path = tmp_path / "transformers-0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("tests/test_modeling_common.py", "tests/fixtures/x.py", "src/y.py", "tests/z.txt"):
            member = tarfile.TarInfo(f"transformers-0/{name}")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"#"))
    made = judge.source.unpack(path, tmp_path / "scratch")
    assert made == ["GenerationTesterMixin", "ExportTesterMixin"]
    found = sorted(str(file.relative_to(tmp_path / "scratch")) for file in (tmp_path / "scratch").rglob("*.py"))
    assert found == [
        "tests/exporters/test_export.py",
        "tests/generation/test_utils.py",
        "tests/test_modeling_common.py",
    ]


def test_a_distribution_without_tests(judge, tmp_path):
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz"):
        pass
    with pytest.raises(SystemExit, match="does not carry"):
        judge.source.unpack(tmp_path / "t.tar.gz", tmp_path / "scratch")
