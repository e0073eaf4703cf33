"""Distillation of LinFusion weights: what is trained, what stays, what is written, and a run that goes on exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap.pipelines import load
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.training.distill import _check_output, distill
from attnswap.training.distill_checkpoint import Checkpoint
from attnswap.training.distill_data import Order, Pictures, generator, loader, read_folder
from attnswap.training.distill_inputs import InputMaker
from attnswap.training.distill_linfusion import LinFusionMethod, LinFusionStudent
from attnswap.training.distill_report import side_by_side, write_report
from attnswap.training.distill_settings import TERMS, LinFusionSettings
from attnswap.training.distill_student import Inputs
from attnswap.training.distill_trainer import Run
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


def pipeline(folder: Path) -> Any:
    pipe = load.load(load.find(str(folder)), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(pipe: Any, pictures: Path, side: int, count: int = 2, **options: Any) -> Inputs:
    make = InputMaker(pipe, "tiny", device=torch.device("cpu"), **options)
    squares = Pictures(read_folder(pictures), [(side, side)] * 6)
    batch = next(iter(loader(squares, Order([range(6)], count, seed=0), 0)))
    return make(batch, generator(0))


def losses(student: LinFusionStudent, inputs: Inputs) -> torch.Tensor:
    return student.losses(student.model, inputs)


def call(unet: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs.arguments).sample


@pytest.fixture(params=["sd", "sdxl"])
def tiny(request: pytest.FixtureRequest) -> tuple[Path, int]:
    """A folder and the side of its pictures."""
    return {"sd": ("tiny_sd", 64), "sdxl": ("tiny_sdxl", 32)}[request.param] and (
        request.getfixturevalue(f"tiny_{request.param}"),
        {"sd": 64, "sdxl": 32}[request.param],
    )


class TestStudent:
    def test_starts_as_linear_attention_with_the_base_weights(self, tiny: tuple[Path, int], pictures: Path) -> None:
        folder, side = tiny
        pipe = pipeline(folder)
        inputs = inputs_of(pipe, pictures, side)
        student = LinFusionStudent(pipe.unet, mid="C/4")
        start = call(pipe.unet, inputs)
        student.remove()
        attention = {name: module for name, module in pipe.unet.named_modules() if name.endswith("attn1")}
        stock = {name: module.processor for name, module in attention.items()}
        for module in attention.values():
            module.set_processor(plain_linear_attention)
        torch.testing.assert_close(start, call(pipe.unet, inputs), atol=1e-5, rtol=1e-5)
        for name, module in attention.items():
            module.set_processor(stock[name])
        assert (start - call(pipe.unet, inputs)).abs().max() > 1e-3  # softmax attention is something else

    def test_the_teacher_is_stock_bit_for_bit(self, tiny: tuple[Path, int], pictures: Path) -> None:
        folder, side = tiny
        pipe = pipeline(folder)
        inputs = inputs_of(pipe, pictures, side)
        stock = call(pipe.unet, inputs)
        student = LinFusionStudent(pipe.unet)
        with student.as_teacher():
            assert torch.equal(call(pipe.unet, inputs), stock)
        assert not torch.equal(call(pipe.unet, inputs), stock)
        student.remove()
        assert torch.equal(call(pipe.unet, inputs), stock)

    def test_only_its_own_tensors_are_trained(self, tiny: tuple[Path, int]) -> None:
        unet = pipeline(tiny[0]).unet
        before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        student = LinFusionStudent(unet)
        trained = {id(p) for p in student.named_parameters().values()}
        assert {id(p) for p in unet.parameters() if p.requires_grad} == trained
        assert len(trained) == 17 * len(student.shapes)
        student.remove()
        assert unet.state_dict().keys() == before.keys()

    def test_losses_are_the_published_ones(self, tiny_sd: Path, pictures: Path) -> None:
        pipe = pipeline(tiny_sd)
        inputs = inputs_of(pipe, pictures, 64)
        outputs: list[dict[str, torch.Tensor]] = []
        attention = {name: module for name, module in pipe.unet.named_modules() if name.endswith("attn1")}
        for name, module in attention.items():
            module.register_forward_hook(lambda m, i, out, name=name: outputs[-1].__setitem__(name, out))
        outputs.append({})
        teacher = call(pipe.unet, inputs)
        student = LinFusionStudent(pipe.unet)
        outputs.append({})
        predicted = call(pipe.unet, inputs)
        layers = [(outputs[1][name] - outputs[0][name]).square().mean() for name in attention]
        outputs.append({})
        expected = [(predicted - inputs.target).square().mean(), (predicted - teacher).square().mean()]
        torch.testing.assert_close(losses(student, inputs), torch.stack([*expected, sum(layers) / len(layers)]))
        assert len(layers) == 16

    def test_training_brings_it_nearer_to_the_teacher(self, tiny_sdxl: Path, pictures: Path) -> None:
        pipe = pipeline(tiny_sdxl)
        inputs = inputs_of(pipe, pictures, 32, 6)
        student = LinFusionStudent(pipe.unet)
        optimizer = torch.optim.AdamW(student.named_parameters().values(), lr=1e-3)
        course = []
        for _ in range(30):
            _, prediction, layers = terms = losses(student, inputs)
            course.append(terms.tolist())
            (prediction + layers).backward()
            optimizer.step()
            optimizer.zero_grad()
        for term in (1, 2):
            assert course[-1][term] < 0.6 * course[0][term]

    def test_gradient_checkpointing_gives_the_same_gradients(self, tiny: tuple[Path, int], pictures: Path) -> None:
        folder, side = tiny
        pipe = pipeline(folder)
        inputs = inputs_of(pipe, pictures, side)
        student = LinFusionStudent(pipe.unet)
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                pipe.unet.enable_gradient_checkpointing()
            losses(student, inputs).sum().backward()
            found.append([p.grad.clone() for p in student.named_parameters().values()])
            pipe.unet.zero_grad()
        assert any(gradient.abs().max() > 0 for gradient in found[0])
        for plain, recomputed in zip(*found, strict=True):
            torch.testing.assert_close(plain, recomputed)

    def test_gradient_checkpointing_keeps_nothing_it_recomputes(self, tiny_sdxl: Path, pictures: Path) -> None:
        pipe = pipeline(tiny_sdxl)
        inputs = inputs_of(pipe, pictures, 32)
        student = LinFusionStudent(pipe.unet)
        pipe.unet.enable_gradient_checkpointing()
        losses(student, inputs).sum().backward()
        assert student._outputs == {}

    @pytest.mark.parametrize(("mid", "widths"), [("C", {None}), ("C/4", {4}), ("5", {5})])
    def test_width_of_the_mlps(self, tiny_sd: Path, mid: str, widths: set[int | None]) -> None:
        student = LinFusionStudent(pipeline(tiny_sd).unet, mid=mid)
        assert {layer.projection_mid_dim for layer in student.shapes} == widths


def plain_linear_attention(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
) -> torch.Tensor:
    """The formula with a layer's own weights: means over the keys, ELU + 1, no scale."""
    query, key, value = (
        to(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in (attn.to_q, attn.to_k, attn.to_v)
    )
    query, key = (torch.nn.functional.elu(x) + 1 for x in (query, key))
    state = key.transpose(-1, -2) @ value / key.shape[2]
    out = query @ state / (query @ key.mean(2).unsqueeze(-1) + 1e-4)
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


class TestInputs:
    def test_sdxl_is_told_size_and_crop(self, tiny_sdxl: Path, pictures: Path) -> None:
        inputs = inputs_of(pipeline(tiny_sdxl), pictures, 32)
        extra = inputs.arguments["added_cond_kwargs"]
        # 80 x 64 pictures, scaled to 40 x 32: four columns are cut off on either side.
        assert extra["time_ids"].tolist() == [[64, 80, 0, 4, 32, 32]] * 2
        assert extra["text_embeds"].shape == (2, 8)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_the_target_is_what_the_model_predicts(self, tiny_sd: Path, pictures: Path, kind: str) -> None:
        pipe = pipeline(tiny_sd)
        pipe.scheduler.register_to_config(prediction_type=kind)
        inputs = inputs_of(pipe, pictures, 64)
        share = pipe.scheduler.alphas_cumprod[inputs.arguments["timestep"]].view(-1, 1, 1, 1)
        clean, noise = {
            "epsilon": lambda x, t: ((x - (1 - share).sqrt() * t) / share.sqrt(), t),
            "sample": lambda x, t: (t, (x - share.sqrt() * t) / (1 - share).sqrt()),
            "v_prediction": lambda x, t: (
                share.sqrt() * x - (1 - share).sqrt() * t,
                (1 - share).sqrt() * x + share.sqrt() * t,
            ),
        }[kind](inputs.arguments["sample"], inputs.target)
        again = pipe.scheduler.add_noise(clean, noise, inputs.arguments["timestep"])
        torch.testing.assert_close(again, inputs.arguments["sample"], atol=1e-4, rtol=1e-4)
        assert noise.std().item() == pytest.approx(1, abs=0.15)
        expected = InputMaker(pipe, "tiny", device=torch.device("cpu"))
        assert expected.scheduler.config.prediction_type == kind

    def test_dropped_captions_are_what_the_pipeline_uses_for_none(self, tiny: tuple[Path, int], pictures: Path) -> None:
        folder, side = tiny
        pipe = pipeline(folder)
        text = inputs_of(pipe, pictures, side, 6).arguments
        some = inputs_of(pipe, pictures, side, 6, caption_dropout=0.5).arguments
        none = pipe.encode_prompt(
            prompt=["x"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )[1]
        kinds = []
        for with_caption, row in zip(text["encoder_hidden_states"], some["encoder_hidden_states"], strict=True):
            kinds.append((torch.equal(row, with_caption), torch.allclose(row, none[0])))
        assert set(kinds) == {(True, False), (False, True)}


@pytest.fixture
def settings(tiny_sdxl: Path, pictures: Path, tmp_path: Path) -> LinFusionSettings:
    return LinFusionSettings(
        model=str(tiny_sdxl),
        data=str(pictures),
        output=tmp_path / "out",
        steps=4,
        batch=2,
        rate=1e-2,
        cpu=True,
        caption_dropout=0.3,
        report_pictures=2,
    )


class TestRun:
    def test_the_unet_is_stock_again(self, settings: LinFusionSettings) -> None:
        run = distill(settings)
        assert isinstance(run, Run)
        stock = pipeline(Path(settings.model)).unet
        assert {name: type(x) for name, x in run.pipe.unet.attn_processors.items()} == {
            name: type(x) for name, x in stock.attn_processors.items()
        }
        for name, tensor in stock.state_dict().items():
            assert torch.equal(tensor, run.pipe.unet.state_dict()[name]), name

    @pytest.mark.parametrize("more", [{}, {"accumulate": 2, "ema": 0.9, "mixed_precision": "fp16"}])
    def test_a_resumed_run_is_the_run(self, settings: LinFusionSettings, tmp_path: Path, more: dict[str, Any]) -> None:
        settings = dataclasses.replace(settings, **more)
        straight = distill(settings)
        parted = dataclasses.replace(settings, output=tmp_path / "parted", save_every=2)
        distill(dataclasses.replace(parted, steps=2))
        # As if it had been killed between two checkpoints.
        with (parted.output / "checkpoint" / "losses.jsonl").open("a") as file:
            file.write(json.dumps({"step": 3, **dict.fromkeys(TERMS, 9.0)}) + "\n")
        resumed = distill(dataclasses.replace(parted, resume=True))
        assert isinstance(straight, Run)
        assert isinstance(resumed, Run)
        assert resumed.losses == straight.losses
        first, second = (load_file(s.output / "diffusion_pytorch_model.safetensors") for s in (settings, parted))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_run_goes_on_after_a_cut_list_of_losses(self, settings: LinFusionSettings) -> None:
        settings = dataclasses.replace(settings, steps=2)
        distill(settings)
        listed = settings.output / "checkpoint" / "losses.jsonl"
        listed.write_text(listed.read_text()[:-20])
        said: list[str] = []
        run = distill(dataclasses.replace(settings, steps=3, resume=True), say=said.append)
        assert isinstance(run, Run)
        assert [row["step"] for row in run.losses] == [1, 3]
        assert any("1 of 2 steps are missing in the damaged losses.jsonl" in line for line in said)
        assert [json.loads(line)["step"] for line in listed.read_text().splitlines()] == [1, 3]
        write_report(run)

    def test_a_run_killed_while_writing_goes_on(self, settings: LinFusionSettings) -> None:
        distill(dataclasses.replace(settings, steps=1))
        (settings.output / ".config.json.77.part").write_text("{")
        assert distill(dataclasses.replace(settings, steps=2, resume=True)) is not None

    def test_a_run_keeps_its_number_of_processes(self, settings: LinFusionSettings) -> None:
        distill(dataclasses.replace(settings, steps=1))
        checkpoint = Checkpoint(settings.output / "checkpoint")
        with pytest.raises(BadInput, match="--resume: the number of processes was 1, not 2"):
            _check_output(dataclasses.replace(settings, resume=True), LinFusionMethod.files, checkpoint, 2)

    def test_a_damaged_picture_costs_no_step(self, settings: LinFusionSettings, pictures: Path) -> None:
        examples = read_folder(pictures)
        third = next(iter(Order([range(len(examples))], 2, seed=0, start=2)))[0]
        whole = examples[third].path.read_bytes()
        examples[third].path.write_bytes(whole[:2000])
        with pytest.raises(JobFailed, match=f"{examples[third].path.name} could not be read"):
            distill(settings)
        examples[third].path.write_bytes(whole)
        run = distill(dataclasses.replace(settings, resume=True))
        straight = distill(dataclasses.replace(settings, output=settings.output.parent / "straight"))
        assert isinstance(run, Run)
        assert isinstance(straight, Run)
        assert run.losses == straight.losses

    @pytest.mark.parametrize(
        ("name", "named"),
        [
            ("checkpoint/state.safetensors", "state.safetensors"),
            ("checkpoint/losses.jsonl", "losses.jsonl"),
            ("diffusion_pytorch_model.safetensors", "out"),
        ],
    )
    def test_what_cannot_be_written_is_named(self, settings: LinFusionSettings, name: str, named: str) -> None:
        (settings.output / "checkpoint").mkdir(parents=True)
        (settings.output / name).mkdir()
        with pytest.raises(JobFailed, match=f"{named} could not be written: Is a directory"):
            distill(dataclasses.replace(settings, steps=1, resume=True))
        assert not list(settings.output.rglob("*.part"))

    def test_a_full_disk_is_one_line(self, settings: LinFusionSettings, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise SafetensorError("No space left on device")

        monkeypatch.setattr("attnswap.training.distill_checkpoint.save_file", full)
        with pytest.raises(JobFailed, match=r"state\.safetensors could not be written: No space left on device"):
            distill(dataclasses.replace(settings, steps=1))

    def test_a_report_that_cannot_be_written(self, settings: LinFusionSettings) -> None:
        run = distill(dataclasses.replace(settings, steps=1))
        assert isinstance(run, Run)
        (settings.output / "report" / "loss.png").mkdir(parents=True)
        with pytest.raises(JobFailed, match="report could not be written: Is a directory"):
            write_report(run)

    def test_what_is_written_can_be_used(self, settings: LinFusionSettings, tiny: tuple[Path, int]) -> None:
        folder, _ = tiny
        settings = dataclasses.replace(settings, model=str(folder), steps=2)
        assert distill(settings) is not None
        config = json.loads((settings.output / "config.json").read_text())
        assert config["_class_name"] == "LinFusion"
        mids = {(layer["dim_n"], layer["projection_mid_dim"]) for layer in config["modules_list"]}
        assert mids == ({(16, None)} if folder.name == "tiny-sd" else {(32, 2)})
        with safe_open(settings.output / "diffusion_pytorch_model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
        pipe = pipeline(folder)
        inspection = attnswap.inspect(pipe, attnswap.LinFusion(weights=str(settings.output)))
        assert sum(layer.accelerated for layer in inspection.layers) == len(config["modules_list"])
        attnswap.enable(pipe, attnswap.LinFusion(weights=str(settings.output)))
        files = {path.suffix for path in settings.output.rglob("*") if path.is_file()}
        assert files == {".json", ".jsonl", ".safetensors"}

    def test_an_average_is_what_is_saved(self, settings: LinFusionSettings) -> None:
        settings = dataclasses.replace(settings, ema=0.9)
        assert distill(settings) is not None
        state = load_file(settings.output / "checkpoint" / "state.safetensors")
        saved = load_file(settings.output / "diffusion_pytorch_model.safetensors")
        assert any(not torch.equal(saved[name], state[f"student.{name}"].half()) for name in saved)
        assert all(torch.equal(saved[name], state[f"average.{name}"].half()) for name in saved)

    def test_minutes_end_a_run(self, settings: LinFusionSettings) -> None:
        run = distill(dataclasses.replace(settings, steps=None, minutes=1e-9))
        assert isinstance(run, Run)
        assert len(run.losses) == 1

    def test_a_longer_run_begins_as_the_shorter(self, settings: LinFusionSettings, tmp_path: Path) -> None:
        short = distill(dataclasses.replace(settings, steps=2))
        long = distill(dataclasses.replace(settings, output=tmp_path / "long", workers=1, steps=4))
        assert isinstance(short, Run)
        assert isinstance(long, Run)
        assert short.losses == long.losses[:2]

    def test_each_step_has_its_own_noise(self, settings: LinFusionSettings, pictures: Path) -> None:
        metadata = pictures / "metadata.jsonl"
        metadata.write_text(metadata.read_text().splitlines()[0])
        run = distill(dataclasses.replace(settings, batch=1, rate=1e-12, caption_dropout=0.0))
        assert isinstance(run, Run)
        assert len({round(row["target"], 4) for row in run.losses}) == len(run.losses) == 4

    def test_mixed_precision_keeps_the_trained_weights_in_float32(self, settings: LinFusionSettings) -> None:
        run = distill(dataclasses.replace(settings, mixed_precision="bf16", steps=2))
        assert isinstance(run, Run)
        assert run.pipe.unet.dtype == torch.bfloat16
        state = load_file(settings.output / "checkpoint" / "state.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}

    def test_report_shows_curves_pictures_and_figures(self, settings: LinFusionSettings) -> None:
        run = distill(settings)
        assert isinstance(run, Run)
        report = write_report(run)
        folder = settings.output / "report"
        assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
        assert report["steps"] == 4
        assert report["pictures"] == 8
        assert 0 < report["psnr_to_teacher"] < 100
        assert set(report["loss"]) == set(TERMS)
        for name in ("loss.png", "pictures.png"):
            with Image.open(folder / name) as image:
                assert len(image.convert("RGB").getcolors(2**24)) > 10

    def test_a_caption_of_several_lines_is_shown_as_one(self) -> None:
        red = [Image.new("RGB", (32, 32), "red")]
        one, two = (side_by_side([text], red, red).tobytes() for text in ("a fox in snow", "a fox\n in\tsnow\n"))
        assert one == two
