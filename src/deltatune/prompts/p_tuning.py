"""P-tuning: X' = [MLP(E); X], or [MLP(BiLSTM(E)); X].   https://arxiv.org/abs/2103.10385

The encoder is needed for training only; its output, the folded prompt, is all that inference uses and PEFT keeps. Files
hold the encoder too, so that training can go on.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Method
from deltatune.config import PeftType, config
from deltatune.inputs.encoder import ROWS, InputEncoder
from deltatune.inputs.prompt import Input
from deltatune.notice import warn
from deltatune.prompts.config import PromptLearningConfig, twenty_tokens


class PromptEncoderReparameterizationType(str, Enum):
    """What the rows come out of."""

    MLP = "MLP"
    LSTM = "LSTM"


@config
class PromptEncoderConfig(PromptLearningConfig):
    """Fields and meaning are PEFT's.

    Attributes:
        encoder_reparameterization_type: "MLP" (three layers), or "LSTM" (bidirectional, and two layers on it).
        encoder_hidden_size: Width inside the encoder; that of an embedded token when left out.
        encoder_num_layers: Layers of the LSTM. The MLP always has three.
        encoder_dropout: Between the layers of the LSTM.
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.peft_type is None:
            self.peft_type = PeftType.P_TUNING
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        owner, kinds = type(self).__name__, [member.value for member in PromptEncoderReparameterizationType]
        kind = self.encoder_reparameterization_type
        if kind not in kinds:
            checks.refuse(owner, "encoder_reparameterization_type", kind, f"one of {', '.join(kinds)}")
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType(kind)
        if self.encoder_hidden_size is not None:
            checks.positive_int(owner, "encoder_hidden_size", self.encoder_hidden_size)
        checks.positive_int(owner, "encoder_num_layers", self.encoder_num_layers)
        checks.probability(owner, "encoder_dropout", self.encoder_dropout)


class PromptEncoder(InputEncoder):
    """The trainable part: `embedding` (P, token_dim) and what reads it, both under PEFT's names.

    Attributes:
        lstm_head: The bidirectional LSTM; None with an MLP.
        mlp_head: The last layers; None once the encoder is folded, when the embedding holds its output.
    """

    lstm_head: nn.LSTM | None
    mlp_head: nn.Sequential | None

    def __init__(self, config: PromptEncoderConfig, word_embeddings: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(config)
        width = self.embedding.embedding_dim
        hidden = config.encoder_hidden_size or width
        self.lstm_head = None
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
            return
        if config.encoder_num_layers != PromptEncoderConfig.encoder_num_layers:
            warn(f"{type(config).__name__}: encoder_num_layers counts layers of an LSTM; the MLP has three")
        layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)]
        self.mlp_head = nn.Sequential(*layers)

    def forward(self, tokens: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
        rows = super().forward(tokens)
        if self.lstm_head is not None:
            rows = self.lstm_head(rows)[0]
        return rows if self.mlp_head is None else self.mlp_head(rows)

    def start_at(self, rows: Tensor) -> None:
        """An encoder cannot be recovered from its output, so this one becomes plain rows."""
        super().start_at(rows)
        self.lstm_head = self.mlp_head = None

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | (self.state_tensors() if self.mlp_head is not None else {})

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        if not self.load_state_tensors(tensors):
            self.start_at(tensors[ROWS])


METHOD = Method(
    PeftType.P_TUNING,
    PromptEncoderConfig,
    None,
    key_prefix="prompt_",
    graft=Input,
    encoder=PromptEncoder,
    learning_rate=1e-3,
    train_options=twenty_tokens,
)
