"""What is installed, and that importing it is cheap and stands in nobody's way."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import attnswap
import pytest

ROOT = Path(attnswap.__file__).parent


def python(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: setuptools builds inside the tree and would pick up what an earlier build left there."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__", "venv")
    return Path(shutil.copytree(ROOT, folder / "source", ignore=left_out))


@pytest.fixture(scope="module")
def wheel(source: Path) -> zipfile.ZipFile:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        "dist",
        "-q",
    ]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


class TestWheel:
    def test_installs_one_top_level_package(self, wheel: zipfile.ZipFile) -> None:
        tops = {name.split("/")[0] for name in wheel.namelist()}
        assert tops == {"attnswap", f"attnswap-{attnswap.__version__}.dist-info"}

    def test_holds_every_module_and_no_test(self, wheel: zipfile.ZipFile, source: Path) -> None:
        modules = {
            f"attnswap/{file.relative_to(source).as_posix()}"
            for package in source.rglob("__init__.py")
            for file in package.parent.glob("*.py")
            if file.relative_to(source).parts[0] not in ("build", "tests")
        }
        assert {name for name in wheel.namelist() if name.endswith(".py")} == modules

    def test_is_typed(self, wheel: zipfile.ZipFile) -> None:
        assert "attnswap/py.typed" in wheel.namelist()

    def test_carries_the_licence(self, wheel: zipfile.ZipFile) -> None:
        (name,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
        assert b"Apache License" in wheel.read(name)

    def test_carries_the_bundled_models(self, wheel: zipfile.ZipFile, source: Path) -> None:
        bundled = {
            f"attnswap/{file.relative_to(source).as_posix()}"
            for file in (source / "pipelines" / "bundled").rglob("*")
            if file.is_file()
        }
        assert bundled <= set(wheel.namelist())

    def test_is_small_enough_for_a_package_index(self, wheel: zipfile.ZipFile) -> None:
        assert sum(entry.file_size for entry in wheel.infolist()) < 60e6

    def test_holds_no_pickle(self, wheel: zipfile.ZipFile) -> None:
        from attnswap.pipelines.load import PICKLES

        assert not [name for name in wheel.namelist() if name.endswith(PICKLES)]


class TestImport:
    def test_takes_under_a_second_beyond_torch(self) -> None:
        # Processor seconds, not wall-clock ones: the machine may be busy.
        code = "import torch, time; t = time.process_time(); import attnswap; print(time.process_time() - t)"
        assert float(python(code)) < 1

    @pytest.mark.parametrize("module", ["gradio", "av", "transformers", "diffusers"])
    def test_does_not_pull_in(self, module: str) -> None:
        assert python(f"import attnswap, sys; print({module!r} in sys.modules)") == "False"

    def test_every_public_name_is_there(self) -> None:
        assert [name for name in attnswap.__all__ if not hasattr(attnswap, name)] == []

    @pytest.mark.parametrize("module", ["kernels", "pipelines", "accel", "training", "benchmarks", "cli"])
    def test_leaves_generic_names_to_others(self, module: str, tmp_path: Path) -> None:
        code = f"import importlib.util as u, attnswap; s = u.find_spec({module!r}); print(s.origin if s else None)"
        assert not python(code, cwd=tmp_path).startswith(str(ROOT))

    def test_the_libraries_work_from_the_checkout(self) -> None:
        """Hugging Face's optional `kernels` package must not be mistaken for the folder of that name."""
        code = (
            "import transformers, diffusers\n"
            "from diffusers import StableDiffusionPipeline\n"
            "from transformers import CLIPTextModel\n"
            "import sys, torch, attnswap\n"
            "x = torch.ones(1, 4, 1, 8)\n"
            "attnswap.kernels.window_attention(x, x, x, grid=(2, 2))\n"
            "print([name for name in sys.modules if name.startswith('kernels.')])"
        )
        assert python(code, cwd=ROOT) == "[]"


class TestMetadata:
    def test_the_version_has_one_source(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert "version" in project["dynamic"]
        assert importlib.metadata.version("attnswap") == attnswap.__version__

    def test_the_constraints_pin_every_dependency(self) -> None:
        from packaging.requirements import Requirement

        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
        versions = {pin.name.replace("_", "-").lower(): str(pin.specifier) for pin in pinned}
        assert all(version.startswith("==") for version in versions.values())
        for requirement in map(Requirement, asked):
            assert versions[requirement.name].removeprefix("==") in requirement.specifier, requirement

    def test_the_readme_commands_are_the_ones_ci_runs(self) -> None:
        command = 'pip install -c constraints.txt -e ".[test]" && pytest'
        assert command in (ROOT / "README.md").read_text(encoding="utf-8")
        assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        assert os.name == "nt" or os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("page", ["README.md", "docs/hidiffusion.md", "docs/kernels.md", "docs/benchmarks.md"])
def test_every_picture_and_page_that_is_linked_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
