"""Evaluations of the mini as a document, with what the judge reads off their pictures."""

import json

import numpy as np
import pytest

from idea_jax.data.images import save_png
from idea_jax.mini import captions, measures, results, strangers
from idea_jax.models.hub import MINI_FOLDER


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two people with each prompt's true drawing, and by another method with their photo always."""
    folder, rows = tmp_path_factory.mktemp("evaluated") / "profiles", []
    drawn = strangers.draw_people("validation", range(2), 1)
    for number, (photo, _, true) in enumerate(drawn):
        for place, prompt in enumerate(captions.PROMPTS):
            for method, pixels in (("true", true[place, 0]), ("photo", photo[0])):
                picture = f"person-{number}/{place:02d}/00000.png"
                save_png(folder / "pictures" / method / picture, pixels, {})
                about = {"method": method, "person": f"person-{number}", "prompt": prompt.text}
                rows.append(about | {"picture": picture})
    (folder / results.ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / results.TABLE).write_text("# Results\n\nTwo people.\n\n## What ran\n\n* this\n")
    return folder, drawn


def test_prompts_kept_are_those_that_the_judge_of_the_lab_reads(evaluated):
    folder, drawn = evaluated
    found = results.shares(folder)
    for number, (_, _, true) in enumerate(drawn):
        seen = measures.read_scenes(MINI_FOLDER, true[:, 0])
        hits = [
            hit
            for place, prompt in enumerate(captions.PROMPTS)
            for hit in measures.kept(
                prompt.asks, {field: values[place] for field, values in seen.items()}
            ).values()
        ]
        assert found["true"][f"person-{number}"] == pytest.approx(np.mean(hits)) and hits
        assert found["photo"][f"person-{number}"] < 0.6 < found["true"][f"person-{number}"]


def test_document_keeps_what_was_written_by_hand_and_is_made_again(evaluated, tmp_path, capsys):
    folder, _ = evaluated
    file = tmp_path / "results.md"
    file.write_text(f"# Mine\n\nWords.\n\n{results.MARK}\n\nold\n")
    for _ in range(2):
        assert results.main([str(folder), "--file", str(file)]) == 0
        text = file.read_text()
        assert text.startswith("# Mine\n\nWords.\n") and "old" not in text
        assert text.count("## Profiles") == text.count("### What ran") == 1
        assert "| photo | " in text and "ahead of true" in text
    assert results.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() in text


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "holds no readable"), ("{}", "holds no readable"), ("none", "holds no readable")],
)
def test_folder_that_is_no_evaluation_is_one_message(content, told, tmp_path, capsys):
    if content is not None:
        (tmp_path / results.ROWS).write_text(content)
    assert results.main([str(tmp_path)]) == 1
    assert told in capsys.readouterr().err


def test_prompts_of_others_are_refused(tmp_path, capsys):
    row = {"method": "paper", "person": "anna", "prompt": "{} in Rome", "picture": "0.png"}
    (tmp_path / results.ROWS).write_text(json.dumps(row))
    assert results.main([str(tmp_path)]) == 1
    assert "does not know" in capsys.readouterr().err


def test_prompts_are_read_as_the_lab_means_them():
    for prompt in captions.PROMPTS:
        assert captions.asked_for(prompt.text) == prompt.asks, prompt.text
    assert captions.asked_for("a painting of {} in a purple shirt") == {
        "style": "painting",
        "shirt": "purple",
    }
    assert captions.asked_for("a photo of {}") == {}
    assert captions.asked_for("{} on Mars") is None
