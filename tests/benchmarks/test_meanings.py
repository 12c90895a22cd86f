"""E2E scores against hand-computed examples: grouping, slot values, swapped inputs, a person's score."""

from __future__ import annotations

import pytest
from harness.meanings import Meaning, fixed_text, group, human_score, linearised, score

ROWS = [
    {"mr": "name[Aromi], food[Thai]", "ref": "Aromi serves Thai food."},
    {"mr": "name[Zizzi], area[city centre]", "ref": "Zizzi is in the city centre."},
    {"mr": "name[Aromi], food[Thai]", "ref": "Thai food is what Aromi serves."},
]


def test_a_record_is_grouped_with_all_its_references_in_order_of_appearance():
    assert group(ROWS) == [
        Meaning("name[Aromi], food[Thai]", ("Aromi serves Thai food.", "Thai food is what Aromi serves.")),
        Meaning("name[Zizzi], area[city centre]", ("Zizzi is in the city centre.",)),
    ]


def test_yes_and_no_are_not_expected_word_for_word():
    record = "name[The Vaults], eatType[pub], priceRange[more than £30], familyFriendly[no], near[Café Adriatic]"
    assert Meaning(record, ("x",)).values == ["The Vaults", "pub", "more than £30", "Café Adriatic"]


def test_a_record_is_written_as_the_base_was_taught():
    assert linearised("name[Blue Spice], eatType[coffee shop], customer rating[5 out of 5], familyFriendly[yes]") == (
        "name: Blue Spice | eat type: coffee shop | customer rating: 5 out of 5 | family friendly: yes"
    )


def test_perfect_outputs_score_everything_and_swapped_ones_what_the_texts_share():
    meanings = group(ROWS)
    found = score(["Thai food is what Aromi serves.", "Zizzi is in the city centre."], meanings)
    assert found["bleu"] == pytest.approx(100)
    assert found["rouge_l"] == pytest.approx(100)
    assert found["slots"] == 1.0  # Aromi, Thai; Zizzi, city centre
    assert found["slots_swapped"] == 0.0
    # "thai food is what aromi serves" and "zizzi is in the city centre" share "is": precision and recall 1/6 each way;
    # with "aromi serves thai food" nothing is shared
    assert found["rouge_l_swapped"] == pytest.approx(100 / 6)
    assert found["bleu_swapped"] < 10
    assert found["distinct"] == 1.0


def test_slot_values_count_over_all_records_together():
    meanings = group(ROWS)
    found = score(["The food at Aromi is good.", "Zizzi, the Thai place of the city, is central."], meanings)
    assert found["slots"] == pytest.approx(2 / 4)  # Aromi and Zizzi; neither Thai in the first nor "city centre"
    assert found["slots_swapped"] == pytest.approx(1 / 4)  # Thai stands in the output of the other record


def test_a_text_that_ignores_its_input_scores_the_same_swapped():
    meanings = [
        Meaning("name[A]", ("The place serves cheap food in the area.", "A nice place.")),
        Meaning("name[B]", ("The place serves cheap food in the area.", "A nice place.")),
    ]
    found = score(["The place serves cheap food in the area."] * 2, meanings)
    assert found["bleu"] == found["bleu_swapped"] == pytest.approx(100)
    assert found["distinct"] == 0.5


def test_a_person_is_scored_against_the_other_references_only():
    several = [
        Meaning("name[A]", ("red cat", "blue dog")),
        Meaning("name[B]", ("the green bird sings", "the green bird sings")),
        Meaning("name[C]", ("alone",)),  # left out: nothing to compare with
    ]
    found = human_score(several)
    assert found["rouge_l"] == pytest.approx((0 + 100) / 2)
    assert found["slots"] == 0.0


def test_the_fixed_text_is_the_one_that_suits_most_records():
    meanings = [Meaning(f"name[{n}]", ("there is a cheap pub in the city centre",)) for n in "AB"]
    meanings.append(Meaning("name[C]", ("an expensive place by the river for the family",)))
    texts = [reference for meaning in reversed(meanings) for reference in meaning.references]
    assert fixed_text(texts, meanings) == "there is a cheap pub in the city centre"


def test_test_records_have_several_references_and_people_repeat_most_slot_values(shared_data):
    from harness.data import rows

    meanings = group(rows("e2e/test"))
    assert len(meanings) == 630 and sum(len(m.references) for m in meanings) == 4693
    found = human_score(meanings[::10])
    assert found["slots"] > 0.75 > 0.3 > found["slots_swapped"]
    assert found["bleu"] > found["bleu_swapped"] + 20
