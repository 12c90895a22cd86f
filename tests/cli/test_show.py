"""What goes into a file or a pipe: no screen, no blanks at the ends of lines."""

import io

from deltatune.cli.show import Trimmed, console, facts


def test_lines_end_where_their_words_do_however_they_are_written():
    stream = io.StringIO()
    trimmed = Trimmed(stream)
    for piece in ("a  b   ", " \n", "c ", "d", "   \n\n", "end  "):
        trimmed.write(piece)
    assert stream.getvalue() == "a  b\nc d\n\nend"


def test_tables_in_a_file_have_no_trailing_blanks(capsys):
    console().print(facts([("name", "x"), ("other", "y" * 30)]))
    assert capsys.readouterr().out == "name   x\nother  " + "y" * 30 + "\n"
