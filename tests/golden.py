"Write tests/golden anew: the numbers behind every figure of the small profile. Run by hand after a change that is meant."
import shutil
import tempfile
from pathlib import Path

from conftest import ROOT, launch

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out:
        done = launch(out, "figures", "--profile", "small")
        assert done.returncode == 0, done.stdout + done.stderr
        shutil.rmtree(ROOT / "tests/golden", ignore_errors=True)
        for file in sorted(Path(out, "figures").rglob("*.csv")):
            target = ROOT / "tests/golden" / file.relative_to(Path(out, "figures"))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            print(target.relative_to(ROOT))
