"""`engine: ray` on a local Ray: the same bytes as those of the local engine."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dataprocess import ray_engine as ray_module
from dataprocess.config import check_config
from dataprocess.process_image import process
from dataprocess.ray_engine import portions, ray_engine

PROJECT = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed; see requirements-ray.txt"
)


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(150):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "7.png").write_text("no image")
    rows = [{"image": f"{number % 151}.png", "caption": f"caption {number}" * (number % 5)} for number in range(1500)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    return tmp_path


def config(data: Path, output: str, **changes):
    source = {"format": "lavis", "annotations": f"{data}/a.json", "images": f"{data}/images"}
    values = {"output": f"{data}/{output}", "on_error": "skip", "image_root": str(data), "sources": [source]}
    return check_config({**values, **changes})


def outputs(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@needs_ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_bytes_are_those_of_the_local_engine(data):
    process(config(data, "local"))
    expected = outputs(data / "local")
    with ray_engine(2) as apply:  # its local Ray serves all that follows; to start it takes seconds
        process(config(data, "ray", engine="ray"))
        assert outputs(data / "ray") == expected and len(expected) == 4
        process(config(data, "local", shard_mb=1))
        report = process(config(data, "ray", engine="ray", shard_mb=1))
        packed, on_ray = outputs(data / "local"), outputs(data / "ray")
        assert on_ray["shards/train-00000.tar"] == packed["shards/train-00000.tar"]
        assert on_ray["train.parquet"] == packed["train.parquet"] and report["sources"]["a"]["read"] == 1500
        with pytest.raises(ValueError, match="(?s)record 'a:0': .*on_error=skip"):
            process(config(data, "strict", engine="ray", on_error="stop"))
        with pytest.raises(ValueError, match="no number"):
            list(apply(int, ["1", "2", "no number"]))


def test_portions(monkeypatch):
    monkeypatch.setattr(ray_module, "BYTES", 10)
    items = [b"x" * size for size in (1, 1, 1, 1, 9, 1, 20, 1)]
    assert [list(map(len, part)) for part in portions(items, 3)] == [[1, 1, 1], [1, 9], [1, 20], [1]]
    assert list(portions([], 3)) == []


def test_without_ray_the_command_says_how_to_get_it(data):
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv[0] = 'process_image.py'\n"
        "from dataprocess.process_image import main\nmain()"
    )
    (data / "c.yaml").write_text(f"sources: [{{format: lavis, annotations: {data}/a.json, images: {data}/images}}]\n")
    result = subprocess.run(
        [sys.executable, "-c", code, "--config", str(data / "c.yaml"), f"output={data}/out", "--engine", "ray"],
        cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "python -m pip install -r requirements-ray.txt" in result.stderr
    assert not (data / "out").exists()


def test_ray_is_not_imported_unless_asked_for(data):
    code = (
        "import sys\nfrom dataprocess.config import load_config\nfrom dataprocess.process_image import process\n"
        f"process(load_config('{data}/c.yaml', ['output={data}/out', 'on_error=skip', 'workers=1']))\n"
        "sys.exit('ray' in sys.modules)"
    )
    (data / "c.yaml").write_text(f"sources: [{{format: lavis, annotations: {data}/a.json, images: {data}/images}}]\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True).returncode == 0
