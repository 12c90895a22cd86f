"""Talking with a base and its adapters: turns, the answer as it is written, switching between adapters."""

from deltatune.chat.session import Session as Session
from deltatune.chat.session import Turn as Turn
