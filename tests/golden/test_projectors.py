"""Projectors against those that the published code builds from structure strings such as "t-s" (group projectors).

Ours are single linear layers from one width to another, each an attribute of its method: that is what the published scripts use. Not ours:
chains of layers; and ReLU, which the published code puts before the first layer, on the states themselves. The projectors of dskd_eta are
without bias, as in DSKDv2, whose code these numbers are not of.
"""

import pytest
from torch import nn

from kdbench import methods
from kdbench.methods.base import Shape
from tests.golden import golden
from tests.methods import relations

SIZE = 20  # of either vocabulary, which no projector depends on


def _ours(case) -> dict[str, dict[str, tuple]]:
    """Projector -> method -> shapes (in, out), of every method with its defaults."""
    shapes = [Shape(case[f"{side}_hidden"], case[f"{side}_hidden"], SIZE) for side in ("student", "teacher")]
    found = {}
    for name in methods.own():
        kind = methods.get(name)
        method = kind(kind.Settings(), *shapes, relations.vocabulary(SIZE, SIZE))
        for path, layer in method.named_modules():
            if isinstance(layer, nn.Linear):
                assert (layer.bias is None) == (name == "dskd_eta")
                found.setdefault(path.split(".")[-1], {})[name] = (layer.in_features, layer.out_features)
    return found


def _is_single(layers) -> bool:
    return len(layers) == 1 and layers[0][0] == "Linear"


@pytest.mark.parametrize("case", golden.cases("projectors"))
def test_layers(case):
    ours, keys = _ours(case), set()
    for name, layers in case["layers"].items():
        expected = [place for place, layer in enumerate(layers) if layer[0] == "Linear"]
        keys |= {f"{name}.{place}.{part}" for place in expected for part in ("weight", "bias")}
        if not _is_single(layers):
            assert name not in ours
            assert layers[0] == ["ReLU"] or len(layers) > 1
            continue
        assert ours[name]
        assert {tuple(shape) for shape in ours[name].values()} == {tuple(layers[0][1:])}, ours[name]
    assert keys == set(case["state_dict_keys"])


def test_every_method_of_dual_spaces_has_the_published_ones():
    ours = _ours({"student_hidden": 8, "teacher_hidden": 12})
    assert {"dskd", "dskd_cma"} <= ours["t2s"].keys()
    assert set(ours["ot"].values()) == {(12, 8)}
    assert set(ours["query"].values()) == {(16, 24)}
