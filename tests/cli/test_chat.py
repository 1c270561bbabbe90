"""`mobilemm chat`: one question, and conversations from a pipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mobilemm
from mobilemm.runtime.pytorch import ChatSession
from mobilemm.runtime.sampling import Sampling

Run = Callable[..., Any]


@pytest.fixture
def answers(pristine: Path, picture: Path) -> Callable[..., list[str]]:
    """What the model says, asked through Python."""

    def ask(*lines: str | Path) -> list[str]:
        session = ChatSession(*mobilemm.load(pristine), Sampling(max_new_tokens=6))
        said = []
        for line in lines:
            if isinstance(line, Path):
                session.look_at(line)
            elif line == "/reset":
                session.reset()
            else:
                said.append(session.reply(line) + "\n")
        return said

    return ask


def test_one_question(run: Run, pristine: Path, picture: Path, answers: Callable[..., list[str]]) -> None:
    ended = run("chat", pristine, "-i", picture, "-p", "What is this?", "--max-new-tokens", 6)
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout == answers(picture, "What is this?")[0]
    assert ended.stdout != run("chat", pristine, "-p", "What is this?", "--max-new-tokens", 6).stdout


def test_options_reach_the_session(run: Run, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[ChatSession] = []

    def stream(session: ChatSession, text: str) -> list[str]:
        heard.append(session)
        return [f"answer to {text}"]

    monkeypatch.setattr(ChatSession, "stream", stream)
    options = "--max-new-tokens 7 --temperature 0.5 --top-k 5 --top-p 0.9 --repetition-penalty 1.2 --seed 3"
    ended = run("chat", pristine, "-p", "a", "--system", "b", "--dtype", "bfloat16", *options.split())
    assert ended.stdout == "answer to a\n"
    [session] = heard
    assert session.sampling == Sampling(7, 0.5, 5, 0.9, 1.2, 3)
    assert session.system == "b"
    assert str(session.model.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("top_p", [0, 0.5, 1])
def test_sampling_runs_at_its_limits(run: Run, pristine: Path, top_p: float) -> None:
    options = ["--temperature", 1, "--top-p", top_p, "--seed", 1, "--max-new-tokens", 3]
    assert run("chat", pristine, "-p", "a", *options).code == 0


def test_a_conversation_from_a_pipe(
    run: Run, pristine: Path, picture: Path, answers: Callable[..., list[str]]
) -> None:
    lines = [
        f"/image {picture}",
        "What is this?",
        "",
        "And this?",
        "/reset",
        "What is this?",
        "/quit",
        "Not this.",
    ]
    ended = run("chat", pristine, "--max-new-tokens", 6, stdin="\n".join(lines))
    assert ended.code == 0
    wanted = answers(picture, "What is this?", "And this?", "/reset", "What is this?")
    assert ended.stdout == "".join(wanted)


def test_a_conversation_goes_on_after_errors(
    run: Run, pristine: Path, picture: Path, tmp_path: Path, answers: Callable[..., list[str]]
) -> None:
    lines = [
        f"/image '{picture}'",
        f"/image {tmp_path}/none.png",
        "/image",
        "/nonsense",
        "a" * 300,
        "What is this?",
    ]
    ended = run("chat", pristine, "--max-new-tokens", 6, stdin="\n".join(lines))  # ends with the pipe
    assert ended.code == 0
    assert ended.stdout == "".join(answers(picture, "What is this?"))
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "none.png" in errors[0]
    assert "context is 256" in errors[1]
    assert ended.stderr.count("known: /image PATH, /reset, /quit") == 2


def test_an_empty_pipe(run: Run, pristine: Path) -> None:
    ended = run("chat", pristine, stdin="")
    assert (ended.code, ended.stdout) == (0, "")


def test_ctrl_c_keeps_what_was_said(run: Run, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(session: ChatSession, text: str) -> Any:
        yield f"{text}…"
        if text == "first":
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "stream", stream)
    ended = run("chat", pristine, stdin="first\nsecond\n")
    assert ended.code == 0
    assert ended.stdout == "first…second…\n"
    assert "(stopped)" in ended.stderr


def test_the_default_model_says_that_it_is_put_together(run: Run, pristine: Path, monkeypatch: Any) -> None:
    from mobilemm.models.checkpoints import default

    monkeypatch.setattr(default, "default_model_folder", lambda: pristine)
    ended = run("chat", "-p", "a", "--max-new-tokens", 2)
    assert ended.code == 0
    assert "put together the first time" in ended.stderr
    assert "put together" not in run("chat", pristine, "-p", "a", "--max-new-tokens", 2).stderr
