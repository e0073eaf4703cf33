"""`enable(pipe, "auto")`: what is chosen for which model, from what is installed, and when calls stay dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attnswap
import huggingface_hub
import pytest
import torch
from attnswap.accel import auto
from attnswap.accel.auto import BREAK_EVEN, BreakEven, Candidate, Size, break_even, choose
from attnswap.accel.families.base import Place
from attnswap.accel.methods.adaspa_schedule import steps_of_run
from attnswap.pipelines import load
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from . import tiny, tiny_dit
from .families import image_models
from .methods import linfusion_cases
from .slim import sample, slim
from .watching import unchanged

RESULTS = Path(attnswap.__file__).parent / "benchmarks" / "results"
HIDIFFUSION = Candidate(attnswap.HiDiffusion(), native_area=64 * 64)
LINFUSION = Candidate(attnswap.LinFusion(), "some/weights")
CLEAR = Candidate(attnswap.Clear(weights="some/weights"), "some/weights")
ADASPA = Candidate(attnswap.AdaSpa())
NOT_HERE = Candidate(None, "its weights some/weights are not on this machine")
UNET = {"hidiffusion": HIDIFFUSION, "linfusion": LINFUSION}


def names(choice: auto.Choice) -> list[str]:
    return [config.name for config in choice.configs]


class TestChoice:
    """Pure: no model is asked."""

    @pytest.mark.parametrize(
        ("side", "chosen"), [(16, []), (64, ["linfusion"]), (78, ["linfusion"]), (79, ["hidiffusion", "linfusion"])]
    )
    def test_of_a_unet_goes_by_area_and_by_tokens(self, side: int, chosen: list[str]) -> None:
        choice = choose("unet", UNET, "cpu", Size(side**2, side**2))
        assert names(choice) == chosen
        assert choice.gate is None, "the size is known"

    def test_of_a_unet_without_weights_is_hidiffusion_alone(self) -> None:
        choice = choose("unet", {**UNET, "linfusion": NOT_HERE}, "cpu", Size(128**2, 128**2))
        assert names(choice) == ["hidiffusion"]
        assert choice.why == (
            "auto: hidiffusion: 4 times the native area, hidiffusion acts above 1.5 times; "
            "linfusion: its weights some/weights are not on this machine"
        )

    def test_of_an_image_transformer_is_clear_with_weights_that_were_distilled_for_it(self) -> None:
        assert names(choose("image", {"clear": CLEAR}, "cpu", Size(5000))) == ["clear"]

    def test_of_an_image_transformer_without_such_weights_is_dense(self) -> None:
        choice = choose("image", {"clear": NOT_HERE}, "cpu", Size(5000))
        assert names(choice) == []
        assert choice.why == "auto: dense attention: clear: its weights some/weights are not on this machine"

    def test_of_a_clip_is_adaspa_from_its_own_min_tokens_on(self) -> None:
        assert names(choose("video", {"adaspa": ADASPA}, "cpu", Size(4095))) == []
        assert names(choose("video", {"adaspa": ADASPA}, "cpu", Size(4096))) == ["adaspa"]

    def test_a_smaller_min_tokens_ends_at_the_break_even(self) -> None:
        least, _ = break_even(attnswap.AdaSpa(), "cpu")
        eager = {"adaspa": Candidate(attnswap.AdaSpa(min_tokens=0))}
        assert names(choose("video", eager, "cpu", Size(least - 1))) == []
        [config] = choose("video", eager, "cpu", Size(least)).configs
        assert config == attnswap.AdaSpa(min_tokens=least)

    def test_a_run_with_fewer_sparse_steps_than_were_measured_is_dense(self) -> None:
        choice = choose("video", {"adaspa": ADASPA}, "cpu", Size(9999, steps=1))
        assert names(choice) == []
        assert choice.why == (
            "auto: dense attention: adaspa: 0 of 1 steps would be sparse, fewer than the 50% it was measured with"
        )
        late = {"adaspa": Candidate(attnswap.AdaSpa(search_steps=(40,)))}
        assert "10 of 50 steps would be sparse" in choose("video", late, "cpu", Size(9999, steps=50)).why
        chosen = {steps: names(choose("video", late, "cpu", Size(9999, steps=steps))) for steps in (39, 40, 50, 80)}
        assert chosen == {39: [], 40: [], 50: [], 80: ["adaspa"]}

    @pytest.mark.parametrize("steps", [4, 5, 8, 12, 20, 50, 100])
    def test_the_published_searches_are_worth_it_in_a_run_of_any_length(self, steps: int) -> None:
        assert names(choose("video", {"adaspa": ADASPA}, "cpu", Size(9999, steps=steps))) == ["adaspa"]

    def test_a_short_run_breaks_even_later(self) -> None:
        eager = {"adaspa": Candidate(attnswap.AdaSpa(min_tokens=0))}
        [short] = choose("video", eager, "cpu", Size(9999, steps=4)).configs
        [long] = choose("video", eager, "cpu", Size(9999, steps=50)).configs
        assert 0 < long.min_tokens < short.min_tokens  # type: ignore[attr-defined]
        said = choose("video", eager, "cpu", Size(9999, steps=50)).why
        assert "(measured on cpu, a run of 50 steps)" in said

    def test_of_clear_counts_the_picture_and_not_the_text(self) -> None:
        least, _ = break_even(CLEAR.config, "cpu")  # type: ignore[arg-type]
        assert names(choose("image", {"clear": CLEAR}, "cpu", Size(least + 511, text=512))) == []
        assert names(choose("image", {"clear": CLEAR}, "cpu", Size(least + 512, text=512))) == ["clear"]

    def test_says_the_numbers_and_where_they_were_measured(self) -> None:
        least, _ = break_even(CLEAR.config, "cpu")  # type: ignore[arg-type]
        said = choose("image", {"clear": CLEAR}, "cpu", Size(5000)).why
        assert said == (
            f"auto: clear: 5,000 image tokens, clear breaks even at {least:,} (measured on cpu), "
            "weights some/weights are here"
        )
        said = choose("image", {"clear": CLEAR}, "cpu", Size(300)).why
        assert said == f"auto: dense attention: 300 image tokens, clear breaks even at {least:,} (measured on cpu)"

    def test_a_device_that_was_not_measured_is_named(self) -> None:
        said = choose("unet", UNET, "cuda", Size(96**2, 96**2)).why
        assert "(a guess: measured on the CPU, and not on cuda, beside hidiffusion)" in said

    def test_is_a_line(self) -> None:
        said = choose("unet", UNET, "cpu").why
        assert "\n" not in said
        beside, alone = (break_even(LINFUSION.config, "cpu", beside=names)[0] for names in (["hidiffusion"], []))  # type: ignore[arg-type]
        assert (
            f"; linfusion breaks even at {beside:,} tokens (measured on cpu, beside hidiffusion), without it at "
            f"{alone:,}, weights some/weights are here"
        ) in said

    def test_of_an_unknown_size_is_left_to_the_calls(self) -> None:
        choice = choose("unet", UNET, "cpu")
        assert names(choice) == ["hidiffusion", "linfusion"]
        assert choice.gate is not None

    @pytest.mark.parametrize(("side", "acts"), [(16, False), (25, True), (78, True), (79, False), (100, True)])
    def test_of_a_call_is_what_is_chosen_for_its_size(
        self, side: int, acts: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also below HiDiffusion's area, where LinFusion acts alone, and breaks even earlier."""
        beside = BreakEven("linfusion", "cpu", 10_000, "nothing", beside="hidiffusion")
        monkeypatch.setattr(auto, "BREAK_EVEN", (BreakEven("linfusion", "cpu", 625, "nothing"), beside))
        gate = choose("unet", UNET, "cpu").gate
        assert gate is not None
        out = gate({"a layer": Place((side, side))}, {"sample": torch.empty(1, 4, side, side)}, None)
        chosen = names(choose("unet", UNET, "cpu", Size(side**2, side**2)))
        assert ("linfusion" in chosen, "linfusion" not in out) == (acts, acts)
        assert "hidiffusion" not in out, "it goes by the area itself"


class TestTable:
    def test_is_what_was_measured(self) -> None:
        [measured] = RESULTS.glob("break-even-*.json")
        result = json.loads(measured.read_text())
        found = {
            (
                entry["method"],
                result["device"]["type"],
                entry["config"].get("radius", 0),
                (entry["beside"] or {}).get("method", ""),
                entry["compared"].removeprefix("a denoiser ").removeprefix("a "),
            ): entry["break_even"]
            # With little text and with much: the later counts, and so the last here.
            for entry in sorted(result["methods"], key=lambda entry: entry["break_even"])
        }
        ours = {
            (e.method, e.device, e.radius, e.beside, e.measured.partition(", ")[2].removeprefix("a ")): e.tokens
            for e in BREAK_EVEN
        }
        assert ours == found

    @pytest.mark.parametrize("entry", [entry for entry in BREAK_EVEN if entry.sparse])
    def test_has_the_share_of_sparse_steps_of_the_run_that_was_measured(self, entry: BreakEven) -> None:
        steps = int(entry.measured.split()[-2])
        first, *later = steps_of_run(attnswap.AdaSpa().search_steps, steps)
        assert entry.sparse == (steps - first - len(later)) / steps

    def test_has_every_method_that_goes_by_tokens(self) -> None:
        assert {entry.method for entry in BREAK_EVEN} | {"hidiffusion"} == set(attnswap.methods())

    def test_a_larger_circle_breaks_even_later(self) -> None:
        small, between, large, larger = (
            break_even(attnswap.Clear(radius=radius), "cpu")[0] for radius in (3, 8, 16, 32)
        )
        assert small < between == large
        assert larger == 4 * large, "by area, beyond what was measured"
        assert [break_even(attnswap.Clear(radius=radius), "cpu")[1] for radius in (8, 16, 32)] == [
            "measured on cpu, at radius 16",
            "measured on cpu",
            "measured on cpu, at radius 16",
        ]


class TestWeights:
    @pytest.fixture
    def unet(self) -> Any:
        """With the layers of SD 1.5, without memory."""
        with torch.device("meta"):
            return UNet2DConditionModel()

    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """An empty cache of the Hub, and no request."""

        def refuse(*_: object, **__: object) -> None:
            pytest.fail("the Hub was asked")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(tmp_path))
        return tmp_path

    def cached(self, cache: Path, repository: str, *files: str) -> None:
        folder = cache / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        for name in files:
            file = folder / "snapshots" / "abc" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    def test_that_are_not_in_the_cache_are_not_used(self, unet: Any) -> None:
        found = auto.candidates(unet)["linfusion"]
        assert found == Candidate(None, "its weights Yuanshi/LinFusion-1-5 are not on this machine")

    def test_that_are_in_the_cache_are_used(self, unet: Any, offline: Path) -> None:
        self.cached(offline, "Yuanshi/LinFusion-1-5", "config.json", "diffusion_pytorch_model.safetensors")
        assert auto.candidates(unet)["linfusion"].about == "Yuanshi/LinFusion-1-5"

    def test_that_came_in_part_are_not_used(self, unet: Any, offline: Path) -> None:
        self.cached(offline, "Yuanshi/LinFusion-1-5", "config.json")
        assert auto.candidates(unet)["linfusion"].config is None

    def test_in_a_folder_are_used(self, unet: Any, tmp_path: Path) -> None:
        settings = {"linfusion": {"weights": str(tmp_path)}}
        assert auto.candidates(unet, settings=settings)["linfusion"].about == str(tmp_path)

    def test_of_flux_dev_are_not_those_of_flux_schnell(self, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(
            "attnswap.accel.methods.clear_weights.in_cache", lambda name, file: asked.append((name, file))
        )
        model = image_models.flux()
        assert auto.candidates(model)["clear"].about == "no weights that were distilled for this model are here"
        assert asked == []
        auto.candidates(image_models.flux(guidance_embeds=True))
        assert ("Huage001/CLEAR", "clear_local_16.safetensors") in asked

    def test_that_were_bundled_for_other_layers_are_not_used(self) -> None:
        assert auto.candidates(image_models.flux())["clear"].config is None


class TestEnabled:
    def test_a_unet_without_weights_gets_hidiffusion(self) -> None:
        pipe = slim("sd15")
        stock = sample(pipe)
        with attnswap.enabled(pipe, "hidiffusion"):
            expected = sample(pipe)
        with unchanged(pipe.unet):
            handle = attnswap.enable(pipe, "auto")
            assert torch.equal(sample(pipe), expected)
            handle.disable()
        assert torch.equal(sample(pipe), stock)
        report = handle.report()
        assert report.to_dict()["method"] == ["hidiffusion"]
        assert "auto: hidiffusion: hidiffusion acts above 1.5 times the native area; linfusion: no weights" in str(
            report
        )

    def test_small_calls_run_dense_bit_for_bit_and_the_report_says_so(self, tmp_path: Path, monkeypatch: Any) -> None:
        unet = tiny.sd15_unet()
        linfusion_cases.write(tmp_path / "weights", unet)
        config = attnswap.LinFusion(weights=str(tmp_path / "weights"))
        monkeypatch.setattr(
            auto,
            "candidates",
            lambda *_, **__: {"hidiffusion": Candidate(None, "left out"), "linfusion": Candidate(config, "some")},
        )
        least, _ = break_even(config, "cpu")
        small, large = (_unet_call(side) for side in (8, 32))
        assert 8 * 8 < least <= 32 * 32
        with torch.no_grad():
            stock = [unet(**call).sample for call in (small, large)]
            with attnswap.enabled(unet, config):
                linear = unet(**large).sample
            with attnswap.enabled(unet, "auto") as handle:
                assert torch.equal(unet(**small).sample, stock[0])
                assert handle.report().density == 1.0
                assert torch.equal(unet(**large).sample, linear)
        [denoiser] = handle.report().denoisers
        [note] = denoiser["notes"]
        assert note["text"] == (
            f"a call ran without linfusion: 64 tokens, linfusion breaks even at {least:,} (measured on cpu)"
        )

    def test_a_bundled_unet_gets_at_each_size_what_is_chosen_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """HiDiffusion has its windows back where calls are too small for LinFusion, which else takes the layers."""
        beside = BreakEven("linfusion", "cpu", 2325, "nothing", beside="hidiffusion")
        monkeypatch.setattr(auto, "BREAK_EVEN", (BreakEven("linfusion", "cpu", 580, "nothing"), beside))
        pipe = load.load(load.find("emoji-sd"), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)

        def pictures(side: int) -> Any:
            arguments = {"width": side, "height": side, "num_inference_steps": 3, "output_type": "latent"}
            return pipe("a fox", **arguments, generator=torch.Generator().manual_seed(0)).images

        def accelerated(report: attnswap.Report) -> int:
            [denoiser] = report.denoisers
            return sum(layer["accelerated_calls"] for layer in denoiser["layers"])

        expected, counts = {64: pictures(64)}, {64: 0}
        for side, methods in ((128, ["hidiffusion"]), (256, ["hidiffusion", "linfusion"])):
            with attnswap.enabled(pipe, methods) as handle:
                expected[side] = pictures(side)
                counts[side] = accelerated(handle.report())
        with attnswap.enabled(pipe, "auto") as handle:
            for side in (128, 256, 64, 256, 128):
                handle.reset()
                assert torch.equal(pictures(side), expected[side]), side
                assert accelerated(handle.report()) == counts[side]
            [denoiser] = handle.report().denoisers
        assert 0 == counts[64] < counts[128] < counts[256]
        assert [note["text"] for note in denoiser["notes"]] == [
            "a call ran without linfusion: 1,024 tokens, linfusion breaks even at 2,325 (measured on cpu, beside "
            "hidiffusion)"
        ]

    def test_a_clip_below_min_tokens_runs_dense_without_a_warning(self, recwarn: pytest.WarningsRecorder) -> None:
        pipe, arguments = tiny_dit.wan()
        call = {**arguments, "num_inference_steps": 2, "output_type": "latent"}
        stock = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
        with attnswap.enabled(pipe, "auto") as handle:
            assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(0)).frames, stock)
        assert [w for w in recwarn if issubclass(w.category, attnswap.AttnswapWarning)] == []
        for denoiser in handle.report().denoisers:
            assert denoiser["method"] == ["adaspa"]
            said = denoiser["notes"][0]["text"]
            assert said.startswith("a call ran without adaspa: ")
            assert said.endswith(" tokens, adaspa acts from 4,096 (its min_tokens)") or "would be sparse" in said

    def test_in_a_compiled_denoiser_each_call_is_decided_outside_the_graph(self, monkeypatch: Any) -> None:
        model, config = image_models.flux(), attnswap.Clear(radius=2)
        monkeypatch.setattr(auto, "candidates", lambda *_, **__: {"clear": Candidate(config, "")})
        monkeypatch.setattr(auto, "BREAK_EVEN", (auto.BreakEven("clear", "cpu", 30, "nothing", radius=2),))
        small, large = (image_models.flux_inputs((side, side), 6, 1) for side in (4, 6))
        with torch.no_grad():
            stock = model(**small).sample
            with attnswap.enabled(model, config):
                local = model(**large).sample
            torch._dynamo.reset()
            model.compile(backend="eager")
            with attnswap.enabled(model, "auto") as handle:
                torch.testing.assert_close(model(**small).sample, stock)
                torch.testing.assert_close(model(**large).sample, local)
            torch._dynamo.reset()
        [denoiser] = handle.report().denoisers
        assert {(layer["accelerated_calls"], layer["dense_calls"]) for layer in denoiser["layers"]} == {(1, 1)}

    def test_processors_carry_it_too(self) -> None:
        pipe = slim("sd15")
        with pytest.warns(attnswap.AttnswapWarning, match="resolution-aware"):
            processors = attnswap.attn_processors(pipe.unet, "auto")
        assert processors.keys() == pipe.unet.attn_processors.keys()
        attnswap.disable(pipe.unet)

    def test_inspect_says_what_it_would_be(self) -> None:
        seen = attnswap.inspect(slim("sd15"), "auto")
        assert seen.method == "hidiffusion"
        assert any(remark.startswith("auto: hidiffusion") for remark in seen.remarks)

    @pytest.mark.parametrize("method", [["auto"], ["auto", "auto"], ["hidiffusion", "auto"], ("auto",)])
    def test_in_a_list_it_is_refused(self, method: Any) -> None:
        with pytest.raises(ValueError, match="auto chooses by itself: give it alone, not in a list"):
            attnswap.enable(slim("sd15"), method)

    def test_where_nothing_can_act_it_is_dense_and_says_why(self) -> None:
        unet = tiny.sd15_unet(
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        call = _unet_call(8)
        with torch.no_grad(), unchanged(unet):
            stock = unet(**call).sample
            with attnswap.enabled(unet, "auto") as handle:
                assert torch.equal(unet(**call).sample, stock)
        said = str(handle.report())
        assert said.startswith("dense attention on UNet2DConditionModel: 1 denoiser calls, 0 of")
        assert "auto: dense attention: hidiffusion: " in said
        assert "linfusion: no weights for these layers are known" in said

    def test_it_is_no_method_of_its_own(self) -> None:
        assert "auto" not in attnswap.methods()


def _unet_call(side: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, 4, side, side, generator=generator),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(1, 4, tiny.TEXT, generator=generator),
    }


def test_bundled_weights_are_found_by_the_layers_of_the_transformer() -> None:
    folder = Path(attnswap.__file__).parent / "pipelines" / "bundled" / "emoji-flux" / "transformer"
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
    assert auto.candidates(model)["clear"] == Candidate(attnswap.Clear(radius=3, weights="emoji-flux"), "emoji-flux")
