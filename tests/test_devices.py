import re

import pytest

from rlrag.devices import DEVICES, Figure, find_device


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_names_its_document_and_year(name):
    figures = [each for each in vars(DEVICES[name]).values() if isinstance(each, Figure)]
    assert len(figures) == 5
    for figure in figures:
        assert figure.value > 1e9
        assert re.search(r"(datasheet|documentation), .*20\d\d", figure.source), figure


def test_this_machine_has_memory_and_no_speed():
    device = find_device("cpu")
    assert device.memory_bytes.value > 2**28
    assert device.flops is None


def test_an_unknown_device():
    with pytest.raises(ValueError, match=r"there is no device 'h300' in the table: choose tpu-v5p, h100, h200 or cpu"):
        find_device("h300")
