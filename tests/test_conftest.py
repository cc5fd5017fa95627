import pytest

from tests.conftest import QUICK


def report_devices():
    import jax

    print("devices", jax.device_count())


def test_runs_functions_scripts_and_source_on_many_devices(run_on_devices, tmp_path):
    assert run_on_devices(report_devices) == "devices 8\n"
    script = tmp_path / "script.py"
    script.write_text("import jax; print(jax.device_count())")
    assert run_on_devices(script, 2) == "2\n"
    assert run_on_devices("import sys; print('jax' in sys.modules)") == "False\n"
    assert QUICK not in run_on_devices("import os; print(os.environ['XLA_FLAGS'])", 1, optimised=True)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("print('said this'); 1 / 0", "(?s)with 1 devices ended with status 1.*said this.*ZeroDivisionError"),
        ("import warnings; warnings.warn('old', DeprecationWarning)", "DeprecationWarning: old"),
    ],
)
def test_a_failing_process_shows_what_it_said(run_on_devices, source, shown):
    with pytest.raises(pytest.fail.Exception, match=shown):
        run_on_devices(source, 1)
