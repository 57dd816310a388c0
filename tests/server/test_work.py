"""What each request gives, number by number, against the library's own functions; and the script that comes with it."""

from __future__ import annotations

import base64
import io
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import logitlab as ll
from logitlab import interventions as iv
from logitlab.vectors import lens_directions, mean_difference
from logitlab.views.tokens import visible
from tests import zoo
from tests.server.conftest import CHAT, Shelf
from tests.server.running import Running, array, events_of, same

PROMPT = "The capital of France is"
OTHER = "The capital of Japan is"
THE, AND = " the", " and"


def asked(do: str = "read", text: str = PROMPT, **more: Any) -> dict[str, Any]:
    return {"do": do, "model": "tiny", "prompt": {"text": text}} | more


def executed(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a script where its names are found; what it has set."""
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(compile(code, "script", "exec"), found)
    return found


@pytest.fixture
def play(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a script; what it prints is left out."""

    def run(result: dict[str, Any]) -> dict[str, Any]:
        found = executed(result["python"], shelf.folder, monkeypatch)
        capsys.readouterr()
        return found

    return run


def final(model: ll.Model, inputs: Any) -> torch.Tensor:
    """Log-probabilities of the next token by a plain call, [V] float64."""
    ids = model.encode(inputs)[0].ids
    with torch.no_grad():
        return model.module(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def check_outcome(model: ll.Model, outcome: dict[str, Any], before: torch.Tensor, after: torch.Tensor) -> None:
    p, q = before.exp(), after.exp()
    assert outcome["kl"] == pytest.approx(float((p * (before - after)).sum()), abs=1e-5)
    ids = [token["id"] for token in outcome["tokens"]]
    assert len(set(ids)) == len(ids)
    assert ids[:5] == after.topk(5).indices.tolist()
    assert set(before.topk(5).indices.tolist()) <= set(ids)
    for token in outcome["tokens"]:
        assert token["before"] == pytest.approx(float(p[token["id"]]), abs=1e-5)
        assert token["after"] == pytest.approx(float(q[token["id"]]), abs=1e-5)
        assert token["token"] == visible(model.vocabulary.label(token["id"]))


# -- load ------------------------------------------------------------------------------------------


def test_facts_of_a_model(app: Running, shelf: Shelf) -> None:
    found = app.result({"do": "load", "model": "tiny"})
    assert found == {
        "model": "tiny",
        "layers": 3,
        "width": 32,
        "kinds": ["resid_pre", "attn_out", "mlp_out", "resid_post", "head_out", "neuron"],
        "lastSite": "2.resid_post",
        "sites": ["0.resid_pre", "0.resid_post", "1.resid_post", "2.resid_post"],
        "verified": shelf.models["tiny"].verification.text,
        "chat": True,
        "images": False,
        "words": True,
        "generates": True,
        "text": True,
    }
    vit = app.result({"do": "load", "model": "vit"})
    assert (vit["chat"], vit["images"], vit["words"], vit["generates"]) == (False, True, False, False)
    llava = app.result({"do": "load", "model": "llava"})
    assert (llava["images"], llava["words"], llava["generates"]) == (True, True, True)


# -- read ------------------------------------------------------------------------------------------


def test_events_come_in_order(app: Running) -> None:
    events = app.events(asked())
    names = [name for name, _ in events]
    assert names == ["queued", "started", *["progress"] * (len(names) - 3), "result"]
    assert events[0][1]["waiting"] == 0
    assert events[1][1] == {}
    assert events[-2][1] == {"what": "reading", "done": 32, "total": 32}  # 4 sites, 8 tokens
    result = events[-1][1]
    assert result["seconds"]["total"] >= result["seconds"]["reading"] > 0


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"targets": [THE, "id:7"], "top_k": 3},
        {"statistics": [], "sites": ["mlp_out", "1.head_out"]},
        {"statistics": ["kl"], "sites": ["::2.resid_post"]},
        {"lens": "tuned", "targets": [THE]},
        {"precision": "screened"},
    ],
)
def test_a_reading(app: Running, shelf: Shelf, play: Any, more: dict[str, Any]) -> None:
    result = app.result(asked(**more))
    given: dict[str, Any] = {name: more[name] for name in ("top_k", "statistics", "sites", "precision") if name in more}
    if "targets" in more:
        given["target"] = [7 if t == "id:7" else t for t in more["targets"]]
    if "lens" in more:
        given |= {"lens": ll.load_lens(shelf.folder / "tuned"), "sites": ["0.resid_post", "1.resid_post"]}
    truth = ll.read(shelf.models["tiny"], PROMPT, **given)
    (grid,) = result["grids"]
    assert grid["title"] == PROMPT
    same(grid["data"], truth)
    same(grid["data"], play(result)["reading"])


def test_notes_about_targets(app: Running) -> None:
    spaced, bare = (zoo.tokenizer()(text, add_special_tokens=False)["input_ids"] for text in (" is", "is"))
    assert app.result(asked(targets=[" is", "he"]))["notes"] == [
        f"target ' is' is token {spaced[0]}; 'is' is another token, {bare[0]}"
    ]


def test_a_chat(app: Running, shelf: Shelf, play: Any) -> None:
    chat = [{"role": "system", "content": "Be 'brief'."}, {"role": "user", "content": PROMPT}]
    result = app.result({"do": "read", "model": "tiny", "prompt": {"chat": chat}})
    assert CHAT.endswith("assistant:")
    same(result["grids"][0]["data"], ll.read(shelf.models["tiny"], chat))
    same(result["grids"][0]["data"], play(result)["reading"])


HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "\"\"\"'''\\ {{7*7}} {x} %s",
    "\u2028\u2029\u202e\x00\x1b[2J",
    "a\r\n\r\nevent: result\ndata: {}\n\n#",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_come_back_as_json_and_in_scripts_as_literals(
    app: Running, shelf: Shelf, play: Any, text: str
) -> None:
    answer = app.post(asked(text=text))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert [line for line in answer.text.split("\n") if line.startswith("event: result")] == ["event: result"]
    name, result = events_of(answer.text)[-1]
    assert name == "result"
    same(result["grids"][0]["data"], ll.read(shelf.models["tiny"], text))
    same(result["grids"][0]["data"], play(result)["reading"])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_come_back_as_json(app: Running, text: str) -> None:
    for request in (asked(targets=[text]), asked(lens=text), asked() | {"model": text}, asked(sites=[text[:40]])):
        answer = app.post(request)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        (error,) = [data for name, data in events_of(answer.text) if name == "error"]
        assert error["kind"] == "input"


# -- compare ---------------------------------------------------------------------------------------


def test_two_prompts(app: Running, shelf: Shelf, play: Any) -> None:
    result = app.result(asked("compare", other={"prompt": {"text": OTHER}}, targets=[THE]))
    assert [grid["title"] for grid in result["grids"]] == [PROMPT, OTHER]
    played = play(result)
    for n, (text, name) in enumerate(((PROMPT, "first"), (OTHER, "second"))):
        same(result["grids"][n]["data"], ll.read(shelf.models["tiny"], text, target=[THE]))
        same(result["grids"][n]["data"], played[name])


def test_two_lenses(app: Running, shelf: Shelf, play: Any) -> None:
    result = app.result(asked("compare", other={"lens": "tuned"}))
    assert [grid["title"] for grid in result["grids"]] == ["logit lens", "tuned"]
    truth = ll.compare(shelf.models["tiny"], PROMPT, {"a": ll.LogitLens(), "b": shelf.lens})
    played = play(result)
    for n, (lens, name) in enumerate((("a", "first"), ("b", "second"))):
        same(result["grids"][n]["data"], truth[lens])
        same(result["grids"][n]["data"], played[name])
    back = app.result(asked("compare", lens="tuned", other={"lens": "logit"}))
    assert [grid["data"]["prompts"] for grid in back["grids"]] == [
        grid["data"]["prompts"] for grid in reversed(result["grids"])
    ]
    same(back["grids"][1]["data"], play(back)["second"])


def test_two_models(app: Running, shelf: Shelf, play: Any) -> None:
    result = app.result(asked("compare", other={"model": "other"}))
    assert [grid["title"] for grid in result["grids"]] == ["tiny", "other"]
    played = play(result)
    for n, name in enumerate(("tiny", "other")):
        same(result["grids"][n]["data"], ll.read(shelf.models[name], PROMPT))
        same(result["grids"][n]["data"], played[("first", "second")[n]])


# -- patch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["1.resid_post", "2.mlp_out", "1.head_out.2", "-1.attn_out"])
def test_one_patch(app: Running, shelf: Shelf, play: Any, site: str) -> None:
    model = shelf.models["tiny"]
    result = app.result(
        asked("patch", source={"text": OTHER}, site=site, position=3, source_position=-1, targets=[THE])
    )
    site = str(model.select_sites(site)[0])
    base, patched, source = result["grids"]
    assert patched["title"] == f"patched: {site} at 3 from -1 of the source"
    same(base["data"], ll.read(model, PROMPT, target=THE))
    same(source["data"], ll.read(model, OTHER, target=THE))
    state = ll.capture(model, OTHER, site, positions=-1)[site][0]
    with iv.intervene(model, iv.replace(site, state, positions=3)):
        truth = ll.read(model, PROMPT, target=THE)
        after = final(model, PROMPT)
    same(patched["data"], truth)
    check_outcome(model, result["outcome"], final(model, PROMPT), after)
    played = play(result)
    same(patched["data"], played["patched"])
    same(base["data"], played["base"])
    same(source["data"], played["theirs"])
    assert played["kl"] == pytest.approx(result["outcome"]["kl"], abs=1e-9)
    assert float(played["after"].exp()[result["outcome"]["tokens"][0]["id"]]) == pytest.approx(
        result["outcome"]["tokens"][0]["after"], abs=1e-9
    )


def test_a_whole_state_patched_at_the_last_place_is_the_source(app: Running, shelf: Shelf) -> None:
    model = shelf.models["tiny"]
    result = app.result(asked("patch", source={"text": OTHER}, site="2.resid_post", position=-1, source_position=-1))
    check_outcome(model, result["outcome"], final(model, PROMPT), final(model, OTHER))


@pytest.mark.parametrize("answers", [[THE, AND], ["id:7"]])
def test_patching_every_place(app: Running, shelf: Shelf, play: Any, answers: list[str]) -> None:
    model = shelf.models["tiny"]
    clean = "The capital of Japan was"
    sites = ["resid_post", "mlp_out"]
    result = app.result(asked("patch_all", source={"text": clean}, answers=answers, sites=sites))
    ids = [7] if answers == ["id:7"] else [zoo.tokenizer()(t)["input_ids"][0] for t in answers]
    given: Any = tuple(ids) if len(ids) == 2 else ids[0]
    truth = iv.patch(model, clean, PROMPT, given, sites=sites)
    (grid,) = result["grids"]
    same(grid["data"], ll.read(model, PROMPT, sites=sites))
    heat = grid["data"]["prompts"][0]["heat"]
    assert {name: heat[name] for name in ("name", "unit", "low", "high")} == {
        "name": "recovery",
        "unit": "1",
        "low": 0,
        "high": 1,
    }
    np.testing.assert_allclose(array(heat["values"]), truth.recovery[0], rtol=1e-5, atol=1e-5)
    assert result["clean"] == pytest.approx(float(truth.clean[0]), abs=1e-6)
    assert result["corrupted"] == pytest.approx(float(truth.corrupted[0]), abs=1e-6)
    measure = {2: lambda p: p[ids[0]] - p[ids[-1]], 1: lambda p: p[ids[0]]}[len(ids)]
    assert result["clean"] == pytest.approx(float(measure(final(model, clean))), abs=1e-4)
    assert result["corrupted"] == pytest.approx(float(measure(final(model, PROMPT))), abs=1e-4)
    assert array(heat["values"])[-1, -1] == pytest.approx(1.0, abs=1e-4)  # the whole state of the answer
    np.testing.assert_allclose(array(heat["values"]), play(result)["found"].recovery[0], rtol=1e-5, atol=1e-5)


def test_patching_equal_prompts_says_that_there_is_nothing_to_recover(app: Running) -> None:
    result = app.result(asked("patch_all", source={"text": PROMPT}, answers=["id:7"]))
    assert np.isnan(array(result["grids"][0]["data"]["prompts"][0]["heat"]["values"])).all()
    assert result["notes"] == ["both runs give the answer the same value: there is nothing to recover"]


# -- steer -----------------------------------------------------------------------------------------

VECTORS = [{"prompts": ["I love the sea", "I hate the wind"]}, {"token": "id:50"}, {"file": "mood.safetensors"}]


def vector_of(shelf: Shelf, vector: dict[str, Any], site: str) -> Any:
    model = shelf.models["tiny"]
    if "prompts" in vector:
        kept = ll.capture(model, vector["prompts"], site, positions=-1)[site].double()
        return (kept[0] - kept[1]).float()
    if "token" in vector:
        return lens_directions(model, 50, [PROMPT], site)[site]
    return shelf.vectors[site]


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("positions", ["all", "last", "each"])
def test_steering(app: Running, shelf: Shelf, play: Any, vector: dict[str, Any], positions: str) -> None:
    model, site = shelf.models["tiny"], "1.resid_post"
    result = app.result(
        asked("steer", vector=vector, site=site, strength=2.5, positions=positions, new_tokens=4, targets=["id:50"])
    )
    along = vector_of(shelf, vector, site)
    plain, steered = result["grids"]
    assert (plain["title"], steered["title"]) == (PROMPT, "steered: 1.resid_post, strength 2.5")
    same(plain["data"], ll.read(model, PROMPT, target=50))
    with iv.intervene(model, iv.add(site, along, strength=2.5, positions=positions)):
        truth = ll.read(model, PROMPT, target=50)
        after = final(model, PROMPT)
        steps = list(ll.generate(model, PROMPT, max_new_tokens=4, do_sample=False))
        ids = model.tokenizer(PROMPT, return_tensors="pt")
        written = model.module.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    same(steered["data"], truth)
    check_outcome(model, result["outcome"], final(model, PROMPT), after)
    assert result["norm"]["vector"] == pytest.approx(float(along.double().norm()), rel=1e-5)
    states = ll.capture(model, PROMPT, site)[site].double().norm(dim=-1)
    middle = states.median() if positions == "all" else states[-1]
    assert result["norm"]["states"] == pytest.approx(float(middle), rel=1e-5)
    assert [step.token_id for step in steps] == written.tolist()
    free = list(ll.generate(model, PROMPT, max_new_tokens=4, do_sample=False))
    assert result["texts"] == ["".join(step.text for step in some) for some in (free, steps)]
    played = play(result)
    same(plain["data"], played["plain"])
    same(steered["data"], played["steered"])
    assert played["kl"] == pytest.approx(result["outcome"]["kl"], abs=1e-9)
    assert [played["text"], played["steered_text"]] == result["texts"]


def test_strength_zero_changes_nothing(app: Running, shelf: Shelf) -> None:
    result = app.result(asked("steer", vector=VECTORS[0], site="-2.resid_post", strength=0))
    plain, steered = (grid["data"] | {"provenance": []} for grid in result["grids"])  # which names the vector
    assert plain == steered  # all that the grid shows
    same(steered, ll.read(shelf.models["tiny"], PROMPT))
    assert result["outcome"]["kl"] == pytest.approx(0, abs=1e-9)
    assert "texts" not in result


def test_a_divergence_that_is_no_number_is_told_as_none() -> None:
    from logitlab.server.work import _divergence

    p, q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64), torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    assert _divergence(p.log(), q.log()) == pytest.approx(np.log(2))  # what cannot come adds nothing
    assert _divergence(q.log(), p.log()) is None  # infinite
    assert _divergence(p.log(), torch.full((3,), torch.nan)) is None
    assert _divergence(torch.full((3,), torch.nan), p.log()) is None
    assert _divergence(p.log(), p.log()) == 0


def test_too_little_memory_is_said(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitlab.server import work

    def full(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. /home/me/private")

    monkeypatch.setattr(work, "read", full)
    message = app.error({"do": "read", "model": "tiny", "prompt": {"text": PROMPT}})
    assert message == "there is not enough memory on cpu for this: shorten the prompt, or name fewer sites"
    monkeypatch.undo()
    app.result({"do": "read", "model": "tiny", "prompt": {"text": PROMPT}})


def test_an_outcome_without_numbers(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitlab.server import work

    final = work._final
    found: list[torch.Tensor] = []

    def broken(at: Any) -> torch.Tensor:
        found.append(final(at))
        return found[-1] if len(found) == 1 else torch.full_like(found[0], torch.nan)

    monkeypatch.setattr(work, "_final", broken)
    outcome = app.result(asked("steer", vector=VECTORS[0], site="1.resid_post"))["outcome"]
    assert outcome["kl"] is None
    assert {token["after"] for token in outcome["tokens"]} == {None}
    assert all(token["before"] is not None for token in outcome["tokens"])


def test_the_direction_of_a_token_goes_through_the_lens_that_is_chosen(app: Running, shelf: Shelf, play: Any) -> None:
    result = app.result(asked("steer", lens="tuned", vector={"token": "id:50"}, site="1.resid_post"))
    model = shelf.models["tiny"]
    along = lens_directions(model, 50, [PROMPT], "1.resid_post", lens=shelf.lens)
    with iv.intervene(model, iv.add("1.resid_post", along)):
        after = final(model, PROMPT)
    check_outcome(model, result["outcome"], final(model, PROMPT), after)
    assert play(result)["kl"] == pytest.approx(result["outcome"]["kl"], abs=1e-9)


# -- generate --------------------------------------------------------------------------------------


def steps_of(events: list[Any]) -> list[dict[str, Any]]:
    return [data for name, data in events if name == "step"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sample": True, "temperature": 1.7, "seed": 3, "targets": ["id:9"], "sites": ["mlp_out"]},
        {"steer": {"vector": VECTORS[0], "site": "1.resid_post", "strength": 3.0}},
        {"steer": {"vector": VECTORS[2], "site": "1.resid_post", "strength": -2, "positions": "last"}, "lens": "tuned"},
    ],
)
def test_generating(app: Running, shelf: Shelf, play: Any, more: dict[str, Any]) -> None:
    model = shelf.models["tiny"]
    events = app.events(asked("generate", new_tokens=6, **more))
    assert events[-1][0] == "result"
    drawn: dict[str, Any] = {"do_sample": False}
    if more.get("sample"):
        drawn = {"do_sample": True, "temperature": 1.7, "seed": 3, "target": [9], "sites": ["mlp_out"]}
    if more.get("lens"):
        drawn |= {"lens": shelf.lens, "sites": ["0.resid_post", "1.resid_post"]}
    if "steer" in more:
        steer = more["steer"]
        along = vector_of(shelf, steer["vector"], "1.resid_post")
        change = iv.add("1.resid_post", along, strength=steer["strength"], positions=steer.get("positions", "each"))
        with iv.intervene(model, change):
            truth = list(ll.generate(model, PROMPT, max_new_tokens=6, **drawn))
    else:
        truth = list(ll.generate(model, PROMPT, max_new_tokens=6, **drawn))
    played = play(events[-1][1])["steps"]
    steps = steps_of(events)
    assert len(steps) == len(truth) == len(played)
    for n, (step, true, again) in enumerate(zip(steps, truth, played, strict=True)):
        assert step["index"] == n
        assert (step["id"], step["text"], step["token"]) == (true.token_id, true.text, visible(true.token))
        assert step["logprob"] == pytest.approx(true.logprob, abs=1e-6)
        same(step["data"], true.reading)
        same(step["data"], again.reading)
    assert events[-1][1]["text"] == "".join(step.text for step in truth)
    assert steps[0]["data"]["provenance"]
    assert not any(step["data"]["provenance"] for step in steps[1:])


def test_a_target_that_is_written_stays_a_target_in_every_step(app: Running, shelf: Shelf) -> None:
    model = shelf.models["tiny"]
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "seed": 5}
    free = list(ll.generate(model, PROMPT, max_new_tokens=4, **drawn))
    wanted = [free[1].token_id, 9, free[2].token_id]  # of these the model writes two, in the second step and the third
    assert len({*wanted, free[0].token_id, free[3].token_id}) == 5
    request = asked("generate", new_tokens=4, sample=True, temperature=1.5, seed=5, targets=[f"id:{i}" for i in wanted])
    steps = steps_of(app.events(request))
    assert [step["id"] for step in steps] == [step.token_id for step in free]
    written: list[int] = []
    for step in steps:
        assert step["data"]["targets"] == ["written", *(visible(model.vocabulary.label(i)) for i in wanted)]
        assert step["data"]["targetIds"] == [-1, *wanted]
        # The same by a reading of what had been written until then.
        along = [*dict.fromkeys([step["id"], *wanted])]
        truth = ll.read(model, [*model.encode(PROMPT)[0].ids, *written], target=along)
        columns = [along.index(i) for i in (step["id"], *wanted)]
        (prompt,) = step["data"]["prompts"]
        for ours, theirs in (("targetLogprob", "target_logprob"), ("targetRank", "target_rank")):
            expected = truth.arrays[theirs][0, :, -1][:, columns]
            np.testing.assert_allclose(array(prompt[ours])[:, 0], expected, rtol=1e-4, atol=1e-4, err_msg=ours)
        written.append(step["id"])


# -- pictures --------------------------------------------------------------------------------------


def pixels(width: int = 50, height: int = 40) -> Any:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def address(image: Any, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind, **({"lossless": True} if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture(app: Running, shelf: Shelf, kind: str, play: Any, tmp_path: Path) -> None:
    uploaded = address(pixels(), kind)
    result = app.result({"do": "read", "model": "vit", "prompt": {"images": [uploaded]}})
    opened = Image.open(io.BytesIO(base64.b64decode(uploaded.partition(",")[2])))
    same(result["grids"][0]["data"], ll.read(shelf.models["vit"], {"images": [opened]}))
    assert f'"picture-1.{kind}"' in result["python"]


def test_a_picture_with_a_text(app: Running, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "<image> is the capital"
    uploaded = address(pixels())
    request = {"do": "read", "model": "llava", "prompt": {"text": text, "images": [uploaded]}, "top_k": 2}
    result = app.result(request)
    truth = ll.read(shelf.models["llava"], {"text": text, "images": [pixels()]}, top_k=2)
    same(result["grids"][0]["data"], truth)
    assert len(result["grids"][0]["data"]["prompts"][0]["pictures"]) == 1
    pixels().save(tmp_path / "picture-1.png")
    monkeypatch.setattr(ll, "load", lambda name: shelf.models[name])
    same(result["grids"][0]["data"], executed(result["python"], tmp_path, monkeypatch)["reading"])
    steps = steps_of(app.events({**request, "do": "generate", "new_tokens": 2}))
    assert [len(step["data"]["prompts"][0]["pictures"]) for step in steps] == [1, 0][: len(steps)]


def test_pictures_that_are_refused(app: Running) -> None:
    def refused(*images: str) -> str:
        return app.error({"do": "read", "model": "vit", "prompt": {"images": list(images)}})

    large = address(Image.new("1", (4000, 4000)))  # 2 MB once decoded, a few bytes before
    assert len(large) < 20_000
    assert refused(large).startswith("the pictures have more than 20,000 pixels together (picture 0: 4,000 x 4,000)")
    header = b"IHDR" + (60_000).to_bytes(4) * 2 + b"\x01\x00\x00\x00\x00"  # 450 MB, as it says of itself
    bomb = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + header + zlib.crc32(header).to_bytes(4) + bytes(4) + b"IDAT"
    said = refused("data:image/png;base64," + base64.b64encode(bomb).decode())
    assert said == "the pictures have more than 20,000 pixels together (picture 0): give smaller ones"
    some = address(pixels(120, 100))
    assert refused(some, some).startswith("the pictures have more than 20,000 pixels together (picture 1")
    assert refused(some, some, some) == "there are 3 pictures; this server takes 2"
    gif = address(pixels(), "gif").replace("image/gif", "image/png")
    assert refused(gif) == "picture 0 is no PNG, JPEG or WebP picture that can be read"
    svg = "data:image/png;base64," + base64.b64encode(b"<svg onload=alert(1)/>").decode()
    assert refused(svg) == "picture 0 is no PNG, JPEG or WebP picture that can be read"
    cut = address(pixels())[:2000]
    cut = cut[: len(cut) - (len(cut.partition(",")[2]) % 4)]
    assert refused(cut).startswith("picture 0 is damaged: ")
    assert refused("data:image/png;base64,AAA").startswith("picture 0 is not base64: ")


def test_a_text_is_never_taken_for_a_file(app: Running, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    pixels().save(path)
    for text in (str(path), path.as_uri(), os.path.relpath(path)):
        assert app.error({"do": "read", "model": "vit", "prompt": {"text": text}}) == (
            "vit reads no text: give a picture"
        )
    assert app.error(asked() | {"prompt": {"images": [address(pixels())]}}) == "tiny reads no pictures: give a text"


# -- what is refused -------------------------------------------------------------------------------


def steered(vector: dict[str, Any], site: str = "1.resid_post", **more: Any) -> dict[str, Any]:
    return asked("steer", vector=vector, site=site) | more


def patched(position: int, source_position: int, **more: Any) -> dict[str, Any]:
    source = {"text": "The sea"}
    where = {"site": "1.resid_post", "position": position, "source_position": source_position}
    return asked("patch", source=source, **where) | more


PICTURE = {"images": [address(pixels())]}
FILE = {"file": "mood.safetensors"}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (asked() | {"model": "/etc/passwd"}, "there is no model '/etc/passwd' here; there are tiny, other, vit,"),
    (asked(lens="../tuned"), "there is no lens '../tuned' here; there are logit, tuned"),
    (asked(lens="tuned") | {"model": "other"}, "this tuned lens was fitted on tiny"),
    (asked(text=""), "the text is empty: give at least one word"),
    (asked(text="a" * 601), "the prompt has 601 characters; this server takes 600: shorten it"),
    (asked(text="x " * 30), "the prompt has 60 tokens; this server takes 48: shorten it"),
    (asked(sites=["neuron", "0.head_out"]), "149 sites at 8 positions are 1,192 cells; this server reads 1,000"),
    (asked(sites=["nonsense"]), "site 'nonsense': unknown kind"),
    (asked(sites=["7.resid_post"]), "layer 7 is out of range"),
    (asked(targets=["id:999999"]), "target id 999999 is not in the vocabulary (0 to 299)"),
    (asked(targets=["id:x"]), "target 'id:x': after id: comes a whole number, for instance id:42"),
    (asked(targets=["Paris is the capital"]), "target 'Paris is the capital' is "),
    (asked("generate", new_tokens=41), "41 new tokens are wanted; this server writes 40"),
    (asked("generate") | {"model": "vit", "prompt": PICTURE}, "vit cannot write"),
    (steered({"file": "no"}), "there are no vectors 'no' here; there are mood"),
    (steered(FILE, "0.resid_post"), "there is no vector (mean difference) for 0.resid_post"),
    (steered(FILE, model="other"), "these vectors were made on tiny"),
    (steered(VECTORS[1], "resid_post"), "'resid_post' is 3 sites: name one, 2.resid_post for"),
    (steered({"prompts": ["a", "a"]}), "both sets of prompts have the same mean"),
    (steered({"prompts": ["a", ""]}), "the text is empty"),
    (patched(9, 0), "position 9 is beyond the prompt, which has 8 tokens (0 to 7)"),
    (patched(0, 99), "position 99"),
    (patched(0, 0, model="vit", prompt=PICTURE), "vit is not read token by token, so it cannot be patched here"),
    (asked("patch_all", source={"text": "The sea"}, answers=["id:5"]), "the prompt has 8 tokens and the source 3: "),
    (
        asked("patch_all", source={"text": PROMPT}, answers=["id:5"], sites=["0.neuron"]),
        "392 places would be patched, each by a pass of its own; this server patches 300",
    ),
    (
        asked(sites=["0:.neuron", "1:.neuron", "2:.neuron", "neuron,neuron,neuron,neuron,neuron"]),
        "1,008 sites are named; this server reads 1,000 cells: name fewer sites",
    ),
    (asked("generate", sites=["1.neuron"], new_tokens=13), "49 sites at 21 positions, 13 of them new, are 1,029 cells"),
    (asked("compare", other={"model": "none"}), "there is no model 'none' here"),
    (asked("compare", other={"prompt": {"text": "x " * 30}}), "the other prompt has "),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED)
def test_one_sentence_says_what_is_wrong(app: Running, request_: dict[str, Any], message: str) -> None:
    found = app.error(request_)
    assert found.startswith(message), found


def test_limits_are_checked_before_any_pass(app: Running, shelf: Shelf) -> None:
    passes: list[int] = []
    hook = shelf.models["tiny"].module.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        assert "cells; this server reads 1,000" in app.error(
            asked(sites=["neuron", "head_out", "resid"], text="the " * 40)
        )
        assert "this server writes 40" in app.error(
            asked("steer", vector=VECTORS[0], site="1.resid_post", new_tokens=99)
        )
        said = app.error(asked("patch_all", source={"text": "The sea"}, answers=["id:5"]))
        assert said.startswith("the prompt has 8 tokens and the source 3: ")
        assert "each by a pass of its own" in app.error(
            asked("patch_all", source={"text": PROMPT}, answers=["id:5"], sites=["0.neuron"])
        )
        assert "sites at 48 positions, 40 of them new, are" in app.error(
            asked("generate", sites=["1.neuron"], new_tokens=40)
        )
        assert "that the model's context holds" in app.error(asked("generate", text="the " * 45, new_tokens=40))
    finally:
        hook.remove()
    assert passes == []


def test_nothing_of_the_work_is_left_on_the_model(app: Running, shelf: Shelf) -> None:
    from tests.zoo import hooks

    assert hooks(shelf.models["tiny"].module) == 0
    before = ll.read(shelf.models["tiny"], PROMPT)
    app.result(asked("steer", vector=VECTORS[0], site="1.resid_post", strength=5, new_tokens=2))
    app.error(asked("steer", vector=VECTORS[2], site="0.resid_post"))
    assert hooks(shelf.models["tiny"].module) == 0
    same(app.result(asked())["grids"][0]["data"], before)


def test_mean_difference_is_what_a_vector_of_prompts_is(shelf: Shelf) -> None:
    found = mean_difference(shelf.models["tiny"], ["I love the sea"], ["I hate the wind"], "1.resid_post")
    assert torch.equal(found["1.resid_post"], vector_of(shelf, VECTORS[0], "1.resid_post"))
