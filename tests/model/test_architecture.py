import dataclasses

import pytest

from rlrag.model.architecture import Architecture, EncoderArchitecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads is 6, not a multiple of num_kv_heads 4"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0: give a positive number"),
        ({"num_layers": -1}, "num_layers is -1: give a positive number"),
        ({"scan_unroll": 0}, "scan_unroll is 0: give a positive number"),
        ({"head_dim": 7}, "head_dim is 7: rotary positions need an even number"),
        ({"dtype": "float16"}, "dtype is 'float16': choose float32 or bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype is 'int8': choose float32 or bfloat16"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0: give a number above 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon is nan: give a number above 0"),
        ({"activation": "relu"}, "activation is 'relu': choose silu or gelu_tanh"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn': choose nothing or linear or llama3"),
        ({"rope_factor": 0.0}, "rope_factor is 0.0: give a number above 0"),
        ({"rope_low": 4.0, "rope_high": 1.0}, "rope_high is 1.0: give more than rope_low, 4.0"),
        ({"attention_scale": -1.0}, "attention_scale is -1.0: give a number above 0, or 0 for none"),
        ({"pattern": "GLX"}, "pattern is 'GLX': write G"),
        ({"pattern": "LG"}, "window is 0, but the pattern 'LG' has local layers"),
    ],
)
def test_sizes_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Architecture(**changes).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 65}, "embed_dim is 65, not a multiple of num_heads 4"),
        ({"max_positions": 0}, "max_positions is 0: give a positive number"),
        ({"num_heads": 0}, "num_heads is 0: give a positive number"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0: give a number above 0"),
        ({"param_dtype": "float16"}, "param_dtype is 'float16': choose float32 or bfloat16"),
    ],
)
def test_sizes_of_an_encoder_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        EncoderArchitecture(**changes).check()


@pytest.mark.parametrize("shape", [Architecture, EncoderArchitecture])
def test_equal_shapes_are_one_static_argument(shape):
    a = shape(num_layers=3)
    a.check()
    assert hash(a) == hash(dataclasses.replace(a))
    assert a == shape(num_layers=3)
    assert a != shape(num_layers=4)
