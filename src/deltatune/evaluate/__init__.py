"""Scores: loss, text against references, classes, slots that appear, and what is left when the inputs are swapped."""

from deltatune.evaluate.answers import Question as Question
from deltatune.evaluate.answers import answer as answer
from deltatune.evaluate.classes import accuracy as accuracy
from deltatune.evaluate.classes import macro_f1 as macro_f1
from deltatune.evaluate.loss import Loss as Loss
from deltatune.evaluate.loss import dataset_loss as dataset_loss
from deltatune.evaluate.loss import target_count as target_count
from deltatune.evaluate.slots import bracketed_slots as bracketed_slots
from deltatune.evaluate.slots import present_share as present_share
from deltatune.evaluate.swap import swapped as swapped
from deltatune.evaluate.swap import swapped_score as swapped_score
from deltatune.evaluate.text import bleu as bleu
from deltatune.evaluate.text import exact_match as exact_match
from deltatune.evaluate.text import rouge_l as rouge_l
