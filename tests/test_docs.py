"""The README's snippets and the examples run; importing the package is light."""

from __future__ import annotations

import os
import re
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
GUIDE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "jax.md").read_text(), re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Those that train or export for long run by `make slow`; tests of what they show run always.
LONG = (
    *(
        "classify_digits",
        "filter_a_signal",
        "finetune_with_trainer",
        "jax_generate",
        "jax_train",
        "onnx_generate",
        "talk_in_a_pipeline",
    ),
    "train_on_a_task",
)
FEW_STEPS = {
    "classify_digits": ["--steps", "2"],
    "filter_a_signal": ["--steps", "2", "--window", "64", "--samples", "600", "--plot", "signal.png"],
}


def run(code: str | Path, cwd: Path, *arguments: str) -> str:
    command = [str(code)] if isinstance(code, Path) else ["-c", code]
    return processes.python(*command, *arguments, cwd=cwd)


def test_the_readme_has_its_snippets() -> None:
    assert len(SNIPPETS) == 7


@pytest.mark.parametrize(
    "snippet", SNIPPETS, ids=["operator", "layer", "model", "documents", "processes", "huggingface", "jax"]
)
def test_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    exec(snippet, {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("snippet", GUIDE, ids=["operators", "models", "devices"])
def test_snippets_of_the_guide_to_jax_run(snippet: str, tmp_path: Path) -> None:
    run(snippet, tmp_path)


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in EXAMPLES],
)
def test_examples_run_and_are_short(example: Path, tmp_path: Path) -> None:
    few = FEW_STEPS.get(example.stem, [])
    assert len(example.read_text().splitlines()) <= (180 if few else 60 if "jax" in example.stem else 40)
    assert run(example, tmp_path, *few)


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, gateloop_transformer as g; assert g.__version__; "
        "heavy = {'torch', 'numpy', 'numba', 'jax', 'matplotlib', 'transformers', 'tqdm'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "g.Transformer; assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    run(code, tmp_path)


def test_the_jax_side_imports_no_torch(tmp_path: Path) -> None:
    modules = "gateloop_transformer.jax, gateloop_transformer.gateloop_transformer_jax"
    run(f"import sys, {modules}; assert 'torch' not in sys.modules", tmp_path)


def test_every_public_name_loads() -> None:
    import gateloop_transformer

    for name in gateloop_transformer.__all__:
        assert getattr(gateloop_transformer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Absent'"):
        gateloop_transformer.Absent  # noqa: B018


def test_every_installation_is_announced() -> None:
    recipes = [part for part in (ROOT / "Makefile").read_text().split("\n\n") if "pip install" in part]
    assert len(recipes) == 4
    for recipe in recipes:
        assert '@echo "Installing' in recipe.split("pip install")[0], recipe
