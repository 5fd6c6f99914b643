"""training/distill.py: a student learns what its teachers answer, and a run remembers its teachers."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import SAMPLE, assert_one_line_error, run_script, six_views, stop_at_the_first_look
from torch.nn import functional as F

import checkpoint
import data
import engine
import models
import recipes
from runtime import cli
from runtime.files import file_sha256
from training import distill

RECIPE = recipes.Recipe(epochs=1, augment={"flip": 0.5, "shift": 1}, distillation=0.9, temperature=4.0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def train(folder, *flags, **how):
    return run_script("train.py", "--model", "mlp", "--data-dir", SAMPLE, "--checkpoint-dir", folder, *flags, **how)


@pytest.fixture
def teachers(trained):
    return [trained[0] / f"best_{model}_fmnist.pt" for model in ("cnn", "mlp")]


def test_answers_are_mean_probabilities_of_all_views_and_are_kept(sample, teachers, cache, monkeypatch):
    split = sample["train"]
    answers = distill.answers(distill.describe(teachers), split)
    assert (answers.shape, answers.dtype) == ((920, 10), torch.float32)
    networks = [checkpoint.load(path)[0].eval() for path in teachers]
    with torch.no_grad():
        expected = (
            sum(network(data.normalise(view)).softmax(1) for network in networks for view in six_views(split.images))
            / 12
        )
    torch.testing.assert_close(answers.exp(), expected, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(engine, "predict_logits", None)
    assert torch.equal(distill.answers(distill.describe(teachers), split), answers)


def test_a_cached_answer_is_used_whole_or_not_at_all(sample, teachers, cache, monkeypatch, capsys):
    split, described = sample["val"], distill.describe(teachers[1:])
    answers = distill.answers(described, split)
    (file,) = cache.iterdir()
    monkeypatch.setattr(distill, "_compute", lambda *_: answers.numpy())
    good, key = file.read_bytes(), []
    monkeypatch.setattr(
        distill, "_sealed", lambda own, content, seal=distill._sealed: key.append(own) or seal(own, content)
    )
    distill.answers(described, split)
    assert capsys.readouterr().err == ""
    nan, ours = np.full((len(split.labels), 10), np.nan, np.float32).tobytes(), key[0]
    for damaged in (
        good[:1000],
        good + b"x",
        good[:40] + b"x" + good[41:],
        distill._sealed("another key", good[32:]),
        b"",
    ):
        file.write_bytes(damaged)
        assert torch.equal(distill.answers(described, split), answers)
        assert "is damaged: the teachers' answers are computed anew" in capsys.readouterr().err
        assert file.read_bytes() == good
    for sealed in (nan, nan[:-1], nan[:-40]):
        file.write_bytes(distill._sealed(ours, sealed))
        assert torch.equal(distill.answers(described, split), answers)
    file.unlink()
    os.mkfifo(file)
    assert torch.equal(distill.answers(described, split), answers)
    monkeypatch.setattr(distill, "_compute", lambda *_: answers.numpy() * np.nan)
    file.unlink()
    with pytest.raises(distill.TeacherError, match="are no numbers"):
        distill.answers(described, split)


def test_the_loss_is_hintons():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 10, generator=generator, requires_grad=True)
    teacher, labels = torch.randn(64, 10, generator=generator), torch.arange(64) % 10
    loss = engine.loss_of(logits, labels, teacher, RECIPE)
    loss.backward()
    again = logits.detach().requires_grad_()
    divergence = F.kl_div((again / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")
    (0.1 * F.cross_entropy(again, labels) + 0.9 * 16 * divergence).backward()
    torch.testing.assert_close(logits.grad, again.grad)
    each = engine.loss_of(logits, labels, teacher, RECIPE, "none")
    torch.testing.assert_close(each.mean(), loss)
    torch.testing.assert_close(each.sum(), engine.loss_of(logits, labels, teacher, RECIPE, "sum"))


def test_a_student_answers_as_its_teacher_does(sample, teachers, cache):
    recipe = RECIPE._replace(epochs=30, batch_size=64, distillation=1.0, temperature=2.0)
    answers = distill.answers(distill.describe(teachers[:1]), sample["train"])
    torch.manual_seed(0)
    student, wrong = models.build("mlp"), sample["train"]._replace(labels=sample["train"].labels * 0)
    for _ in engine.Training(student, wrong, None, recipe, seed=0, teacher=answers).run():
        pass
    taught = engine.predict_logits(student, sample["test"]).argmax(1)
    teacher = engine.predict_logits(checkpoint.load(teachers[0])[0], sample["test"]).argmax(1)
    assert (taught == teacher).double().mean() > 0.75  # it has seen no right label


def test_a_distilled_run_says_who_taught_it_and_resumes_without_its_flags(teachers, tmp_path):
    flags = ["--recipe", "distilled", "--epochs", 3]
    taught = train(tmp_path / "whole", *flags, "--teacher", *teachers)
    assert taught.returncode == 0, taught.stderr
    history = json.loads((tmp_path / "whole" / "best_mlp_fmnist.json").read_text())
    assert [teacher["model"] for teacher in history["flags"]["teachers"]] == ["cnn", "mlp"]
    assert history["flags"]["teachers"][0]["sha256"] == file_sha256(teachers[0])

    own = tmp_path / "teacher.pt"
    shutil.copy(teachers[0], own)
    stopped = train(tmp_path / "cut", *flags, "--teacher", own, before=stop_at_the_first_look)
    assert stopped.returncode == 143
    assert_one_line_error(train(tmp_path / "cut", "--resume", "--teacher", teachers[1]), "--teacher was .*leave the")
    content = own.read_bytes()
    shutil.copy(teachers[1], own)
    assert_one_line_error(train(tmp_path / "cut", "--resume"), "no longer the teacher this run began with")
    own.write_bytes(content)
    assert train(tmp_path / "cut", "--resume").returncode == 0


def test_a_teacher_and_the_recipe_that_needs_one_go_together(teachers, tmp_path):
    assert_one_line_error(train(tmp_path, "--recipe", "distilled"), "--teacher CHECKPOINT go together")
    assert_one_line_error(train(tmp_path, "--teacher", teachers[0]), "--teacher CHECKPOINT go together")
    assert_one_line_error(train(tmp_path, "--recipe", "distilled", "--teacher", tmp_path / "none.pt"), "none.pt")


def test_what_a_teacher_was_chosen_on_is_remembered(teachers, tmp_path):
    flags = ["--epochs", 1, "--recipe", "distilled", "--teacher"]
    assert train(tmp_path / "a", "--select", "test", "--epochs", 1).returncode == 0
    optimistic = tmp_path / "a" / "best_mlp_fmnist.pt"
    assert_one_line_error(train(tmp_path / "b", *flags, optimistic, "--select", "val"), "--select val: a teacher was")
    assert train(tmp_path / "b", *flags, optimistic).returncode == 0
    said = run_script("evaluate.py", tmp_path / "b" / "best_mlp_fmnist.pt", "--data-dir", SAMPLE).stdout
    assert "caution: a teacher's best epoch was chosen on these very images" in said
    assert train(tmp_path / "c", *flags, teachers[0], "--select", "val").returncode == 0


def test_a_teacher_of_other_classes_is_refused(sample, teachers, tmp_path, cache):
    names = tuple(f"class {number}" for number in range(10))
    with pytest.raises(checkpoint.CheckpointError, match=r"best_cnn_fmnist\.pt: trained for the classes T-shirt"):
        distill.answers(distill.describe(teachers), sample["train"]._replace(classes=names))
    assert not cache.exists()


def test_the_cache_lies_inside_the_clone():
    assert distill.CACHE.is_relative_to(cli.ROOT / ".cache")
