"""No reader runs what a file says: pickles, YAML tags, programs in weights."""

import ast
from pathlib import Path

import pytest

import pcd_ray

PACKAGE = Path(pcd_ray.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMED = {
    ("yaml_text.py", "yaml.load"),  # with a loader of plain data, tested beside
}
NEVER = """
pickle.load pickle.loads pickle.Unpickler marshal.loads shelve.open joblib.load dill.loads
cloudpickle.load cloudpickle.loads eval exec yaml.load yaml.load_all yaml.unsafe_load
yaml.full_load yaml.safe_load os.system torch.hub.load torch.jit.load torch.export.load
"""


def _wrong_calls(source: str) -> list[str]:
    """Return the calls of a source that could run a file's content."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        said = {word.arg: ast.unparse(word.value) for word in node.keywords}
        unpickles = name == "torch.load" and said.get("weights_only") != "True"
        allows = said.get("allow_pickle", "False") != "False" or said.get("shell") == "True"
        if name in NEVER.split() or unpickles or allows:
            found.append(name)
    return found


def test_wrong_calls_are_found() -> None:
    source = "torch.load(f); np.load(f, allow_pickle=True); pickle.loads(d); yaml.load(t, L)"
    assert _wrong_calls(source) == ["torch.load", "np.load", "pickle.loads", "yaml.load"]
    assert _wrong_calls("torch.load(f, weights_only=True); np.load(f); model.eval()") == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_is_run(path: Path) -> None:
    wrong = _wrong_calls(path.read_text())
    assert [name for name in wrong if (path.name, name) not in NAMED] == []
