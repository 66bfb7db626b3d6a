"""The pictures of the masks: what is drawn is the layout of the passes, under the right names."""

import numpy as np
import pytest

from minipass.errors import InputError
from minipass.extras.figures import CACHE, LOOKAHEAD, PICTURES, REAL, fused, picture, training, two_pass, write_all

matplotlib = pytest.importorskip("matplotlib")


def sees(panel) -> dict[str, list[str]]:
    """For each row's name the names of the rows that it sees."""
    visible = panel.layout.visible[0].numpy()
    return {name: list(np.array(panel.names)[visible[row]]) for row, name in enumerate(panel.names)}


def positions(panel) -> dict[str, str]:
    return dict(zip(panel.names, panel.positions(), strict=True))


def test_the_two_passes_of_two_pass_decoding():
    draft, verify = two_pass(n_lookahead=2)
    assert sees(draft) == {"root": ["root"], "LA1": ["root", "LA1"], "LA2": ["root", "LA1", "LA2"]}
    assert sees(verify) == {"x": ["x"], "d1": ["x", "d1"], "d2": ["x", "d1", "d2"]}
    assert positions(draft) == {"root": "n-1", "LA1": "n", "LA2": "n+1"}
    assert positions(verify) == {"x": "n", "d1": "n+1", "d2": "n+2"}


def test_the_fused_pass():
    (panel,) = fused(n_lookahead=3)
    real = ["root", "d1", "d2", "d3"]
    for j in range(4):
        assert sees(panel)[real[j]] == real[: j + 1]
        for i in range(1, 4):
            assert sees(panel)[f"({j},{i})"] == real[: j + 1] + [f"({j},{s})" for s in range(1, i + 1)]
    assert positions(panel)["(0,1)"] == positions(panel)["d1"] == "n"
    assert positions(panel)["(3,3)"] == "n+5"


def test_the_training_sequence():
    (panel,) = training(n_text=9, cuts=(1, 5), n_lookahead=2)
    assert sees(panel)["(1,2)"] == ["t0", "t1", "(1,1)", "(1,2)"]
    assert sees(panel)["t8"] == [f"t{i}" for i in range(9)]
    assert positions(panel)["(5,2)"] == positions(panel)["t7"] == "7"


@pytest.mark.parametrize("panels", PICTURES.values())
def test_filled_cells_are_those_of_the_mask(panels):
    panels = panels()
    for axes, panel in zip(picture(panels).axes, panels, strict=True):
        cells = {
            (round(patch.get_y()), round(patch.get_x())): matplotlib.colors.to_hex(patch.get_facecolor()).upper()
            for patch in axes.patches
        }
        visible = panel.layout.visible[0].numpy()
        for (row, column), colour in cells.items():
            if column < 0:
                assert colour == CACHE and panel.after_cache
            else:
                assert (colour != "#FFFFFF") == visible[row, column]
                assert colour in ("#FFFFFF", REAL if column < panel.n_real else LOOKAHEAD)
        assert len(cells) == len(panel.names) * (len(panel.names) + panel.after_cache)
        columns = [label.get_text() for label in axes.get_xticklabels()]
        assert columns == ["cache"] * panel.after_cache + panel.names
        assert [label.get_text() for label in axes.get_yticklabels()] == panel.names


def test_pictures_are_small_and_the_same_each_time(tmp_path):
    first, second = write_all(tmp_path / "a"), write_all(tmp_path / "b")
    assert [path.name for path in first] == [f"{name}.png" for name in PICTURES]
    for path, again in zip(first, second, strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 60_000


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_all(tmp_path / "file")
