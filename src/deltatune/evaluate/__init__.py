"""Scores: loss, text, classes, tags, answers and slots against the truth, and what is left when inputs are swapped."""

from deltatune.evaluate.answers import Question as Question
from deltatune.evaluate.answers import answer as answer
from deltatune.evaluate.classes import accuracy as accuracy
from deltatune.evaluate.classes import macro_f1 as macro_f1
from deltatune.evaluate.loss import Loss as Loss
from deltatune.evaluate.loss import dataset_loss as dataset_loss
from deltatune.evaluate.loss import target_count as target_count
from deltatune.evaluate.read import read as read
from deltatune.evaluate.read import tags_of as tags_of
from deltatune.evaluate.slots import bracketed_slots as bracketed_slots
from deltatune.evaluate.slots import present_share as present_share
from deltatune.evaluate.spans import best_span as best_span
from deltatune.evaluate.spans import read_spans as read_spans
from deltatune.evaluate.squad import squad_exact_match as squad_exact_match
from deltatune.evaluate.squad import squad_f1 as squad_f1
from deltatune.evaluate.swap import swapped as swapped
from deltatune.evaluate.swap import swapped_score as swapped_score
from deltatune.evaluate.tags import entities as entities
from deltatune.evaluate.tags import entity_scores as entity_scores
from deltatune.evaluate.tags import shown as shown
from deltatune.evaluate.tags import tag_scores as tag_scores
from deltatune.evaluate.text import bleu as bleu
from deltatune.evaluate.text import exact_match as exact_match
from deltatune.evaluate.text import rouge_l as rouge_l
from deltatune.evaluate.text import rouge_n as rouge_n
