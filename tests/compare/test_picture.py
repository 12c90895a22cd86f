"""The picture of a comparison: every candidate's name can be read."""

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltatune.compare import picture


def test_names_of_points_that_are_near_each_other_do_not_cover_each_other():
    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = [
        (picture.Point(f"candidate {i}", 0.75 + i / 1000, (0.01, 0.01), 100, None, False), 100 + i) for i in range(5)
    ]
    axes.set(xlim=(90, 130), ylim=(0.6, 0.9))
    figure.canvas.draw()
    picture._name(axes, places)
    assert {text.get_text() for text in axes.texts} == {point.name for point, _ in places}
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    first = picture._AROUND[0]
    assert any(text.get_position() != first for text in axes.texts)  # they would have covered each other there
