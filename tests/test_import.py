"""The package can be imported in any directory, whatever else is installed."""

import subprocess
import sys
from pathlib import Path


def test_the_directory_above_a_clone_imports_the_package_and_not_an_empty_one(tmp_path: Path) -> None:
    """A clone is a directory named int8cli without an `__init__.py`: to Python, a namespace package of that name."""
    (tmp_path / "int8cli" / "int8cli").mkdir(parents=True)
    code = "import int8cli; print(int8cli.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_without_numpy_gives_no_warning() -> None:
    """numpy is not a dependency. torch warns about this when it is first imported."""
    code = "import sys; sys.modules['numpy'] = None; import int8cli.llm_int8"
    done = subprocess.run([sys.executable, "-c", f"{code}, torch"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
