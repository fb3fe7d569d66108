"""``import dml_accel`` is light, and timm knows our networks in every order of imports."""

import json
import sys
from pathlib import Path

import pytest
import torch

from dml_accel.data.batches import Normalisation
from dml_accel.data.pixels import Geometry
from dml_accel.models.peer_folder import write_peer
from dml_accel.models.spec import parse_cohort
from tests.helpers import ROOT, build_peer, run_program, tiny_config


def python(*lines: str, flags: tuple[str, ...] = ("-W", "error")) -> str:
    """Run lines of Python in a fresh interpreter; return what they print."""
    done = run_program(sys.executable, *flags, "-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = "print(*({'torch', 'timm', 'numpy', 'accelerate', 'datasets'} & set(sys.modules)))"


def test_importing_the_package_imports_neither_torch_nor_timm() -> None:
    assert python("import sys, dml_accel", LOADED) == ""
    assert python("import sys, dml_accel", "from dml_accel import Config, UsageError", LOADED) == ""
    assert python("import sys, dml_accel", "dir(dml_accel), dml_accel.__version__", LOADED) == ""


def test_what_is_used_is_imported_then() -> None:
    names = "dml_accel.learn, dml_accel.StepRecord, dml_accel.EvaluationRecord, dml_accel.networks"
    found = python(
        "import dml_accel",
        f"print(*(one.__name__ for one in ({names})))",
        "print(all(hasattr(dml_accel, name) for name in dir(dml_accel)))",
        "from dml_accel import *",
        "print(learn is dml_accel.learn)",
    )
    assert found.splitlines() == [
        "learn StepRecord EvaluationRecord dml_accel.models.networks",
        "True",
        "True",
    ]


def test_an_unknown_name_is_an_attribute_error() -> None:
    script = "import dml_accel\ntry: dml_accel.trian\nexcept AttributeError as error: print(error)"
    assert python(script) == "module 'dml_accel' has no attribute 'trian'"


# ---------------------------------------------------------------- timm

CASES = {
    "timm last": "import dml_accel; import timm",
    "timm first": "import timm; import dml_accel",
    "a module of timm first": "import dml_accel; import timm.models; import timm",
    "a function of timm first": "import dml_accel; from timm import create_model; import timm",
    "a part of a module": "import dml_accel; from timm.layers import create_conv2d; import timm",
    "a light module of ours": "import dml_accel.core.config; import timm",
    "the networks themselves": "from dml_accel.models import networks; import timm",
    "the networks as an attribute": "import dml_accel; dml_accel.networks; import timm",
    "import_module": "import dml_accel, importlib; timm = importlib.import_module('timm')",
    # Libraries ask whether timm is installed long before anybody imports it.
    "asked whether timm is there": """
import dml_accel
from importlib.util import find_spec
assert find_spec("timm").origin.endswith("timm/__init__.py")
assert all(find_spec("timm") for _ in range(3))
import timm
""",
    "asked for a module of timm": """
import dml_accel
from importlib.util import find_spec
assert find_spec("timm.models")  # which imports timm
import timm
""",
    "reloaded before timm is imported": """
import importlib
import dml_accel
for _ in range(3):
    importlib.reload(dml_accel)
import timm
""",
    "asked and reloaded after timm was imported": """
import importlib, importlib.util, sys, warnings
import dml_accel
before = importlib.util.find_spec("timm")
import timm
assert importlib.util.find_spec("timm") is timm.__spec__
warnings.simplefilter("ignore")  # timm says that names are registered again
assert importlib.reload(timm) is timm
assert importlib.reload(dml_accel) is dml_accel
before.loader.exec_module(importlib.util.module_from_spec(before))
import timm.models
assert not any("dml_accel" in type(finder).__module__ for finder in sys.meta_path)
""",
    "an import of timm that failed is repeated": """
import sys
import dml_accel
there = sys.modules["torchvision"]
sys.modules["torchvision"] = None  # as if it were missing
try:
    import timm
except ModuleNotFoundError as error:
    assert "torchvision" in str(error)
else:
    raise AssertionError("timm does not need torchvision")
sys.modules["torchvision"] = there
import timm
""",
}
# Each case runs in a process of its own, which is forked after the slow imports.
FORK = """
import json, os, sys, traceback, warnings
warnings.simplefilter("ignore")
import torch, torchvision
warnings.simplefilter("error")
found = {}
for case, lines in json.loads(sys.argv[1]).items():
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            known = {}
            exec(lines, known)
            timm = known["timm"]
            assert timm.is_model("resnet8_cifar")
            assert timm.create_model("resnet8_cifar").num_classes == 100
            text = "known"
        except BaseException:
            text = traceback.format_exc()
        os.write(writer, text.encode()[-4000:])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        found[case] = file.read()
    os.wait()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What became of each case."""
    done = run_program(sys.executable, "-c", FORK, json.dumps(CASES))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_timm_knows_our_networks(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == "known"


def test_without_timm_the_error_is_the_ordinary_one() -> None:
    # -S leaves out the installed packages; the package itself needs none of them to be imported.
    lines = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        "import dml_accel",
        "from importlib.util import find_spec",
        "assert find_spec('timm') is None",
        "try: import timm",
        "except ModuleNotFoundError as error: print(error.name, error)",
        "try: dml_accel.networks",
        "except ModuleNotFoundError as error: print(error.name)",
        "print(dml_accel.Config().optim.lr)",
    )
    found = python(*lines, flags=("-I", "-S", "-W", "error")).splitlines()
    assert found[0] == "timm No module named 'timm'"
    assert found[1] in ("timm", "torch")
    assert found[2] == "0.1"


# ---------------------------------------------------------------- a trained peer


def test_timm_loads_a_trained_peer_after_importing_the_package_alone(tmp_path: Path) -> None:
    (spec,) = parse_cohort(["resnet8[drop_rate=0.1]"])
    net = build_peer(spec, tiny_config(float64=False), 10).eval()
    write_peer(
        tmp_path / "resnet8-0",
        net,
        spec,
        {"top1": 0.5, "n": 1},
        classes=tuple(map(str, range(10))),
        normalisation=Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        geometry=Geometry(16, 16),
        dataset="digits",
        steps=1,
        teachers=["resnet8-1"],
    )
    files = {path.name for path in (tmp_path / "resnet8-0").iterdir()}
    assert files == {"model.safetensors", "config.json", "README.md"}
    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    with torch.no_grad():
        expected = net(images)[0].tolist()
    found = python(
        "import dml_accel, timm, torch",
        f"net = timm.create_model('local-dir:{tmp_path / 'resnet8-0'}', pretrained=True).eval()",
        "images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)",
        "with torch.no_grad(): print(*net(images)[0].tolist())",
        "settings = timm.data.resolve_model_data_config(net)",
        "print(*settings['input_size'], *settings['mean'], *settings['std'])",
        "print(*net.pretrained_cfg['label_names'], net.drop_rate)",
    ).splitlines()
    assert [float(word) for word in found[0].split()] == pytest.approx(expected, abs=1e-6)
    assert found[1] == "3 16 16 0.1 0.2 0.3 0.4 0.5 0.6"
    assert found[2] == "0 1 2 3 4 5 6 7 8 9 0.1"
