"""Which backend runs, and what is said about it."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import dispatch
from attnswap.kernels.dispatch import Implementation, Verdict
from attnswap.kernels.window_attention import eager


@pytest.fixture(autouse=True)
def no_backend_in_the_environment(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def explain(qkv):
    return lambda: kernels.explain("window_attention", *qkv((4, 4)), grid=(4, 4))


@pytest.fixture
def probe(monkeypatch):
    """A registry with one made-up operation whose backends return their names; returns how to register it."""
    monkeypatch.setattr(dispatch, "_OPS", {})
    monkeypatch.setattr(dispatch, "triton_ready", lambda device: Verdict(True, "pretended"))

    def register(**triton):
        dispatch.register(
            "probe",
            check=lambda query: {"query": query},
            implementations=(
                Implementation("triton", f"{__name__}:unused", **triton),
                Implementation("eager", f"{__name__}:unused"),
            ),
        )

    return register


class OnGpu(torch.Tensor):
    """Says it is on a GPU, which is all the choice of a backend looks at."""

    device = torch.device("cuda:0")


ON_GPU = torch.zeros(1).as_subclass(OnGpu)


def test_without_a_gpu_eager_runs_and_triton_says_why_not(explain, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = explain()
    assert found.backend == "eager"
    considered = {entry.backend: entry for entry in found.considered}
    assert set(considered) == {"triton", "eager", "reference"}
    assert not considered["triton"].can
    assert "cpu" in considered["triton"].reason
    assert considered["triton"].reason in found.reason


def test_on_a_gpu_triton_runs(probe):
    probe()
    assert kernels.explain("probe", ON_GPU).backend == "triton"


def test_an_implementation_may_stand_back_when_nobody_asked_for_it(probe):
    probe(prefer=lambda **call: Verdict(False, "measured slower"))
    assert (kernels.explain("probe", ON_GPU).backend, kernels.explain("probe", ON_GPU).reason) == (
        "eager",
        "measured slower",
    )
    with kernels.use_backend("triton"):
        assert kernels.explain("probe", ON_GPU).backend == "triton"


def test_a_missing_triton_is_a_reason_not_an_import_error(explain, monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert "triton cannot run: triton is not installed" in explain().reason
    with kernels.use_backend("triton"), pytest.raises(ValueError, match="triton is not installed"):
        explain()


def test_the_block_goes_before_the_environment_and_both_before_auto(explain, monkeypatch):
    assert explain().reason != "asked for by use_backend"
    monkeypatch.setenv("ATTNSWAP_BACKEND", "reference")
    assert (explain().backend, explain().reason) == ("reference", "asked for by ATTNSWAP_BACKEND")
    with kernels.use_backend("eager"):
        assert (explain().backend, explain().reason) == ("eager", "asked for by use_backend")
        with kernels.use_backend("reference"):
            assert explain().backend == "reference"
        assert explain().backend == "eager"
    assert explain().backend == "reference"


def test_a_block_that_fails_leaves_no_backend_behind(explain):
    with pytest.raises(RuntimeError), kernels.use_backend("reference"):
        raise RuntimeError
    assert explain().backend == "eager"


def test_a_backend_is_chosen_for_one_thread_only(explain):
    seen = []
    with kernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(explain().backend))
        thread.start()
        thread.join()
    assert seen == ["eager"]


def test_the_chosen_backend_is_the_one_that_computes(qkv, monkeypatch):
    monkeypatch.setattr(eager, "window_attention", lambda query, **call: torch.full_like(query, 7.0))
    tensors = qkv((4, 4))
    with kernels.use_backend("eager"):
        assert (kernels.window_attention(*tensors, grid=(4, 4)) == 7).all()
    with kernels.use_backend("reference"):
        assert (kernels.window_attention(*tensors, grid=(4, 4)) != 7).all()


def test_a_backend_that_cannot_run_raises_with_the_reason(qkv):
    call = {"grid": (4, 4), "windows": (2, 2)}
    with kernels.use_backend("triton"), pytest.raises(ValueError, match="triton"):
        kernels.window_attention(*qkv((4, 4), dtype=torch.float64), **call)
    if dispatch.triton_interprets():
        with kernels.use_backend("triton"), pytest.raises(ValueError, match="head dimension 264 is above 256"):
            kernels.window_attention(*qkv((4, 4), head_dim=264), **call)


def test_unknown_backends_are_refused_with_the_valid_names(explain, monkeypatch):
    with (
        pytest.raises(ValueError, match=r"'cuda'; valid are auto, reference, eager, triton"),
        kernels.use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv("ATTNSWAP_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"ATTNSWAP_BACKEND: unknown backend 'fast'"):
        explain()


def test_an_unknown_operation_is_refused_with_near_names():
    with pytest.raises(ValueError, match="did you mean window_attention"):
        kernels.explain("window_atention")


def test_explain_refuses_what_the_operation_refuses(qkv):
    with pytest.raises(ValueError, match="holds 20 tokens, but there are 16"):
        kernels.explain("window_attention", *qkv((4, 4)), grid=(4, 5))


def test_an_explanation_reads_as_text_and_cannot_be_changed(explain):
    found = explain()
    lines = str(found).splitlines()
    assert lines[0].startswith("window_attention: eager (")
    assert [line.split()[0] for line in lines[1:]] == ["triton", "eager", "reference"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.backend = "triton"


def test_every_operation_has_a_reference_an_eager_and_a_triton_implementation():
    assert "window_attention" in kernels.ops()
    for name in kernels.ops():
        assert set(dispatch.get_op(name).implementations) == set(dispatch.BACKENDS), name


def test_the_function_and_its_package_share_a_name():
    from attnswap.kernels.window_attention import window_attention

    assert kernels.window_attention is window_attention
    assert callable(kernels.window_attention)
