"""Distillation of CLEAR weights: what is trained and compared, what FLUX is given, and what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap.pipelines import load
from attnswap.pipelines.presets import Preset
from attnswap.training.distill import distill
from attnswap.training.distill_clear import ClearMethod, ClearStudent, compared
from attnswap.training.distill_data import Pictures, generator, read_folder
from attnswap.training.distill_inputs_flux import FluxInputs
from attnswap.training.distill_report import write_report
from attnswap.training.distill_settings import TERMS, ClearSettings
from attnswap.training.distill_student import Inputs
from attnswap.training.distill_trainer import Run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from .conftest import write_pictures

WIDE = (48, 32)


def pipeline(folder: Path) -> Any:
    pipe = load.load(load.find(str(folder)), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoded(pipe: Any, pictures: Path, cache: Path, size: tuple[int, int] = WIDE, **options: Any) -> FluxInputs:
    make = FluxInputs(pipe, device=torch.device("cpu"), max_sequence_length=16, **options)
    make.encode(Pictures(read_folder(pictures), [size] * 6), cache, batch=2)
    return make


def call(transformer: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs.arguments).sample


def arguments_of(pipe: Any, **options: Any) -> dict[str, Any]:
    """What a pipeline itself gives its transformer in the first step."""
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipe(num_inference_steps=1, output_type="latent", **options)
    hook.remove()
    return seen[0]


@pytest.fixture
def pipe(tiny_flux: Path) -> Any:
    return pipeline(tiny_flux)


@pytest.fixture
def inputs(pipe: Any, pictures: Path, tmp_path: Path) -> Inputs:
    return encoded(pipe, pictures, tmp_path / "cache")([0, 3], generator(0))


class TestInputs:
    def test_flux_is_given_what_its_pipeline_gives(self, pipe: Any, pictures: Path, tmp_path: Path) -> None:
        """C6: the published script depends on the version of Diffusers for ids."""
        ours = encoded(pipe, pictures, tmp_path / "cache", guidance=2.5)([1, 4], generator(0)).arguments
        text = ["picture 1", "picture 4"]
        width, height = WIDE
        theirs = arguments_of(pipe, prompt=text, width=width, height=height, guidance_scale=2.5, max_sequence_length=16)
        assert ours.keys() == theirs.keys() - {"joint_attention_kwargs", "return_dict"}
        for name in ("img_ids", "txt_ids", "guidance", "encoder_hidden_states", "pooled_projections"):
            torch.testing.assert_close(ours[name], theirs[name])
        assert len(ours["img_ids"]) == ours["hidden_states"].shape[1] == width * height // 16
        assert ours["hidden_states"].shape == theirs["hidden_states"].shape
        assert theirs["timestep"].tolist() == [1, 1]  # noise levels, not thousandths
        assert ((ours["timestep"] > 0) & (ours["timestep"] <= 1)).all()

    def test_tokens_are_packed_as_the_pipeline_unpacks_them(self, pipe: Any) -> None:
        """C6."""
        latents = torch.randn(2, 4, 16, 24)
        packed = FluxInputs(pipe, device=torch.device("cpu")).pack(latents)
        assert torch.equal(pipe._unpack_latents(packed, 32, 48, pipe.vae_scale_factor), latents)

    def test_noise_and_picture_are_mixed_as_flow_matching_has_it(
        self, pipe: Any, pictures: Path, tmp_path: Path
    ) -> None:
        make = encoded(pipe, pictures, tmp_path / "cache")
        inputs = make([2, 0], generator(7))
        pixels = torch.stack([Pictures(read_folder(pictures), [WIDE] * 6)[index]["pixels"] for index in (2, 0)])
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.sample(generator(7))  # the first that is drawn
        clean = make.pack((latents - 0.1) * 0.4)
        level = inputs.arguments["timestep"].view(-1, 1, 1)
        noisy = inputs.arguments["hidden_states"]
        torch.testing.assert_close(noisy - level * inputs.target, clean, atol=1e-4, rtol=1e-4)
        assert (noisy + (1 - level) * inputs.target).std().item() == pytest.approx(1, abs=0.05)

    def test_noise_levels_are_uniform(self, pipe: Any, pictures: Path, tmp_path: Path) -> None:
        make = encoded(pipe, pictures, tmp_path / "cache", (8, 8))
        levels = make([0] * 2000, generator(0)).arguments["timestep"]
        shares = torch.histc(levels, 4, 0, 1) / 2000
        torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.04, rtol=0)

    def test_captions_left_out_are_empty_ones(self, pipe: Any, pictures: Path, tmp_path: Path) -> None:
        make = encoded(pipe, pictures, tmp_path / "cache", caption_dropout=0.5)
        texts = make([0] * 20, generator(0)).arguments["encoder_hidden_states"]
        kinds = {text: pipe.encode_prompt(text, None, max_sequence_length=16)[0][0] for text in ("", "picture 0")}
        found = {name for text in texts for name, kind in kinds.items() if torch.allclose(text, kind, atol=1e-5)}
        assert found == {"", "picture 0"}

    def test_processes_share_the_encoding(self, pipe: Any, pictures: Path, tmp_path: Path) -> None:
        whole = encoded(pipe, pictures, tmp_path / "whole")
        squares = Pictures(read_folder(pictures), [WIDE] * 6)
        parts = [FluxInputs(pipe, device=torch.device("cpu"), max_sequence_length=16) for _ in range(2)]
        for process, part in enumerate(parts):
            part.encode(squares, tmp_path / "parts", batch=2, process=process, processes=2)
        for part in parts:
            mine, theirs = (one([0, 1, 2, 3, 4, 5], generator(0)) for one in (part, whole))
            torch.testing.assert_close(mine.target, theirs.target)
            torch.testing.assert_close(
                mine.arguments["encoder_hidden_states"], theirs.arguments["encoder_hidden_states"]
            )


class TestStudent:
    @pytest.mark.parametrize("down_factor", [None, 2])
    def test_starts_as_local_attention_with_the_base_weights(
        self, pipe: Any, inputs: Inputs, down_factor: int | None
    ) -> None:
        student = ClearStudent(pipe.transformer, radius=3, down_factor=down_factor)
        start = call(pipe.transformer, inputs)
        student.remove()
        dense = call(pipe.transformer, inputs)
        with attnswap.enabled(pipe, attnswap.Clear(radius=3, down_factor=down_factor)):
            torch.testing.assert_close(start, call(pipe.transformer, inputs), atol=1e-6, rtol=1e-5)
        assert (start - dense).abs().max() > 1e-3

    def test_the_teacher_is_stock_bit_for_bit(self, pipe: Any, inputs: Inputs) -> None:
        stock = call(pipe.transformer, inputs)
        student = ClearStudent(pipe.transformer, radius=3)
        with student.as_teacher():
            assert torch.equal(call(pipe.transformer, inputs), stock)
        assert not torch.equal(call(pipe.transformer, inputs), stock)
        student.remove()
        assert torch.equal(call(pipe.transformer, inputs), stock)

    @pytest.mark.parametrize("down_factor", [None, 2])
    def test_the_published_tensors_are_trained_and_no_others(self, pipe: Any, down_factor: int | None) -> None:
        before = set(pipe.transformer.state_dict())
        student = ClearStudent(pipe.transformer, radius=3, down_factor=down_factor)
        trained = student.named_parameters()
        assert {id(p) for p in pipe.transformer.parameters() if p.requires_grad} == set(map(id, trained.values()))
        projections = {f"{name}.{kind}" for name in ("to_q", "to_k", "to_v") for kind in ("weight", "bias")}
        pooling = {"processor.spatial_weight"} if down_factor else set()
        expected = {
            "transformer_blocks.0.attn": projections | pooling | {"to_out.0.weight", "to_out.0.bias"},
            "single_transformer_blocks.0.attn": projections | pooling,
            "single_transformer_blocks.1.attn": projections | pooling,
        }
        assert set(trained) == {f"{layer}.{name}" for layer, names in expected.items() for name in names}
        if down_factor:
            assert (trained["transformer_blocks.0.attn.processor.spatial_weight"] == 1 / 4).all()
        student.remove()
        assert set(pipe.transformer.state_dict()) == before

    def test_losses_are_the_published_ones(self, pipe: Any, inputs: Inputs) -> None:
        blocks = pipe.transformer.single_transformer_blocks
        seen: list[list[torch.Tensor]] = []
        for block in blocks:  # attention and MLP enter the projection side by side
            block.proj_out.register_forward_pre_hook(lambda m, args: seen[-1].append(args[0][..., :16]))
        seen.append([])
        teacher = call(pipe.transformer, inputs)
        student = ClearStudent(pipe.transformer, radius=3, every=1)
        seen.append([])
        predicted = call(pipe.transformer, inputs)
        seen.append([])
        layers = [(ours - theirs).square().mean() for ours, theirs in zip(seen[1], seen[0], strict=True)]
        assert [x.shape for x in seen[0]] == [(2, 16 + 96, 16)] * 2  # text and image
        expected = [(predicted - inputs.target).square().mean(), (predicted - teacher).square().mean()]
        found = student.losses(pipe.transformer, inputs)
        torch.testing.assert_close(found, torch.stack([*expected, sum(layers) / len(layers)]))
        assert found.dtype == torch.float32

    def test_training_brings_it_nearer_to_the_teacher(self, pipe: Any, inputs: Inputs) -> None:
        student = ClearStudent(pipe.transformer, radius=2, down_factor=2, every=1)
        optimizer = torch.optim.AdamW(student.named_parameters().values(), lr=1e-2)
        course = []
        for _ in range(40):
            _, prediction, layers = terms = student.losses(pipe.transformer, inputs)
            course.append(terms.tolist())
            (prediction + layers).backward()
            optimizer.step()
            optimizer.zero_grad()
        for term in (1, 2):
            assert course[-1][term] < 0.6 * course[0][term]
        assert student.named_parameters()["transformer_blocks.0.attn.processor.spatial_weight"].std() > 0

    def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_nothing(self, pipe: Any, inputs: Inputs) -> None:
        student = ClearStudent(pipe.transformer, radius=3, down_factor=2, every=1)
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                pipe.transformer.enable_gradient_checkpointing()
            student.losses(pipe.transformer, inputs).sum().backward()
            found.append([p.grad.clone() for p in student.named_parameters().values()])
            pipe.transformer.zero_grad()
        assert all(gradient.abs().max() > 0 for gradient in found[0])
        for plain, recomputed in zip(*found, strict=True):
            torch.testing.assert_close(plain, recomputed)
        assert student._outputs == {}

    def test_the_layers_compared_are_the_published_ones(self) -> None:
        flux = [f"transformer_blocks.{i}.attn" for i in range(19)]
        flux += [f"single_transformer_blocks.{i}.attn" for i in range(38)]
        assert compared(flux, 4) == [f"single_transformer_blocks.{i}.attn" for i in range(1, 38, 4)]
        assert compared(flux[17:20], 4) == ["single_transformer_blocks.0.attn"]
        assert compared(flux[:5], 2) == [f"transformer_blocks.{i}.attn" for i in (0, 2, 4)]


@pytest.fixture
def settings(tiny_flux: Path, pictures: Path, tmp_path: Path) -> ClearSettings:
    return ClearSettings(
        model=str(tiny_flux),
        data=str(pictures),
        output=tmp_path / "out",
        size=32,
        steps=4,
        batch=2,
        rate=1e-2,
        radius=3,
        cpu=True,
        caption_dropout=0.3,
        report_pictures=2,
    )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


class TestRun:
    @pytest.mark.parametrize("embedded", [True, False])
    def test_pictures_are_drawn_with_the_guidance_that_is_trained(
        self, settings: ClearSettings, pipe: Any, embedded: bool
    ) -> None:
        pipe.transformer.register_to_config(guidance_embeds=embedded)
        settings = dataclasses.replace(settings, guidance=2.5)
        method = ClearMethod(settings, pipe, Preset(guidance=4.0), device=torch.device("cpu"))
        assert [sampling.guidance for sampling in method.samplings] == [2.5 if embedded else 4.0]

    def test_the_pipeline_is_stock_again(self, settings: ClearSettings) -> None:
        run = distill(settings)
        assert isinstance(run, Run)
        stock = pipeline(Path(settings.model))
        processors = {name: type(x) for name, x in run.pipe.transformer.attn_processors.items()}
        assert processors == {name: type(x) for name, x in stock.transformer.attn_processors.items()}
        state = run.pipe.transformer.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in stock.transformer.state_dict().items())
        assert {path.name for path in settings.output.iterdir()} == {"checkpoint", "clear_local_3.safetensors"}

    @pytest.mark.parametrize(
        "more", [{}, {"down_factor": 2, "accumulate": 2, "ema": 0.9, "mixed_precision": "bf16", "clip": None}]
    )
    def test_a_resumed_run_is_the_run(self, settings: ClearSettings, tmp_path: Path, more: dict[str, Any]) -> None:
        settings = dataclasses.replace(settings, **more)
        straight = distill(settings)
        parted = dataclasses.replace(settings, output=tmp_path / "parted")
        distill(dataclasses.replace(parted, steps=2))
        # As if it had been killed in the middle of the third step.
        (parted.output / "cache").mkdir()
        (parted.output / "cache" / "text").write_bytes(b"x")
        resumed = distill(dataclasses.replace(parted, resume=True))
        assert isinstance(straight, Run)
        assert isinstance(resumed, Run)
        assert resumed.losses == straight.losses
        first, second = weights_in(settings.output), weights_in(parted.output)
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("down_factor", [None, 2])
    def test_what_is_written_can_be_used(
        self, settings: ClearSettings, inputs: Inputs, down_factor: int | None
    ) -> None:
        settings = dataclasses.replace(settings, down_factor=down_factor)
        run = distill(settings)
        assert isinstance(run, Run)
        name = "clear_local_3_down_2.safetensors" if down_factor else "clear_local_3.safetensors"
        with safe_open(settings.output / name, "pt") as file:
            assert file.metadata()["radius"] == "3"
            keys = set(file.keys())
            assert {file.get_tensor(key).dtype for key in keys} == {torch.float16}
        student = ClearStudent(run.pipe.transformer, radius=3, down_factor=down_factor)
        assert keys == set(student.named_parameters())
        state = load_file(settings.output / "checkpoint" / "state.safetensors")
        with torch.no_grad():
            for key, parameter in student.named_parameters().items():
                parameter.copy_(state[f"student.{key}"].half())
        trained = call(run.pipe.transformer, inputs)
        student.remove()
        with attnswap.enabled(
            run.pipe, attnswap.Clear(radius=3, down_factor=down_factor, weights=str(settings.output))
        ):
            loaded = call(run.pipe.transformer, inputs)
        torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=1e-5)
        assert (loaded - call(run.pipe.transformer, inputs)).abs().max() > 5e-2

    def test_the_gradient_is_clipped(self, settings: ClearSettings, tmp_path: Path) -> None:
        settings = dataclasses.replace(settings, steps=2, rate=1e-3)
        free = distill(dataclasses.replace(settings, clip=None))
        clipped = distill(dataclasses.replace(settings, clip=1e-9, output=tmp_path / "clipped"))
        assert isinstance(free, Run)
        assert isinstance(clipped, Run)
        assert free.losses[0] == clipped.losses[0]
        # AdamW's steps do not depend on the size of a gradient until it is that of its epsilon.
        assert free.losses[1] != clipped.losses[1]

    def test_pictures_keep_their_shapes(self, settings: ClearSettings, tmp_path: Path) -> None:
        data = write_pictures(tmp_path / "mixed", 4, (80, 60))
        lines = (data / "metadata.jsonl").read_text()
        for number in range(4):
            name = f"tall-{number}.png"
            Image.new("RGB", (50, 110), (number, 0, 0)).save(data / name)
            lines += json.dumps({"file_name": name, "text": name}) + "\n"
        (data / "metadata.jsonl").write_text(lines)
        run = distill(dataclasses.replace(settings, data=str(data)))
        assert isinstance(run, Run)
        assert run.facts["sizes"] == ["36x28", "20x48"]
        assert len(run.losses) == 4
        given = dataclasses.replace(settings, size=None, width=(32, 16), height=(16, 32), output=tmp_path / "given")
        run = distill(dataclasses.replace(given, data=str(data), steps=1))
        assert isinstance(run, Run)
        assert run.facts["sizes"] == ["32x16", "16x32"]

    def test_the_teacher_draws_the_sizes_in_turn(self, settings: ClearSettings, tmp_path: Path) -> None:
        (tmp_path / "c.txt").write_text("a fox\nan owl\na kiwi\n")
        sizes = {"size": None, "width": (32, 16), "height": (16, 32)}
        distill(dataclasses.replace(settings, data=str(tmp_path / "c.txt"), steps=1, **sizes))
        drawn = sorted((settings.output / "data").glob("*.png"))
        assert [Image.open(path).size for path in drawn] == [(32, 16), (16, 32), (32, 16)]

    def test_report_measures_before_and_after(
        self, settings: ClearSettings, copy_of: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import numpy as np
        from attnswap.pipelines.emoji_reference import Reference

        folder = copy_of(Path(settings.model))
        Reference(("fox", "owl"), np.zeros((2, 32, 32, 4), np.uint8), {"red": (230, 40, 40)}).save(folder / "reference")
        (folder / "attnswap.json").write_text('{"native_side": 32, "steps": 2, "max_sequence_length": 16}')
        changed = {"model": str(folder), "data": "captions", "report_captions": 3, "size": None}
        run = distill(dataclasses.replace(settings, **changed))
        assert isinstance(run, Run)
        assert len(run.captions) == 4
        report = write_report(run)
        measured = report["measured"]
        assert {"dense", "before", "after"} <= measured.keys()
        assert set(measured["dense"]) == {"nearest", "nearest_of_five", "colour", "count"}
        assert measured["before"]["psnr"] != measured["after"]["psnr"]
        assert set(report["loss"]) == set(TERMS)
        assert (settings.output / "report" / "pictures.png").is_file()
