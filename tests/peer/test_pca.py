"""`IncrementalPCA` finds what PEFT's finds."""

import peft.utils.incremental_pca
import pytest
import torch
from torch.testing import assert_close

from deltatune.errors import ConfigError, MismatchError
from deltatune.lora.pca import IncrementalPCA

FITTED = (
    *("components_", "singular_values_", "explained_variance_", "explained_variance_ratio_", "noise_variance_"),
    *("mean_", "var_", "n_samples_seen_", "n_components", "n_features_"),
)


def rows(count=150, features=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(features) + 1


OPTIONS = (
    {"n_components": 4},
    {},
    {"n_components": 4, "batch_size": 40},
    {"n_components": 3, "lowrank": True, "lowrank_seed": 1},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fits_as_pefts(options):
    X = rows()
    before = X.clone()
    ours, theirs = IncrementalPCA(**options).fit(X), peft.utils.incremental_pca.IncrementalPCA(**options).fit(X)
    assert torch.equal(X, before)
    for name in FITTED:
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-9, check_dtype=False, msg=name)
    assert_close(ours.transform(X), theirs.transform(X), rtol=1e-9, atol=1e-9)


def test_batch_by_batch_and_the_last_one_not_too_small():
    ours, theirs = IncrementalPCA(5), peft.utils.incremental_pca.IncrementalPCA(5)
    for n, size, least in ((10, 3, 0), (10, 3, 2), (12, 4, 5), (3, 5, 1)):
        assert list(ours.gen_batches(n, size, least)) == list(theirs.gen_batches(n, size, least))
    for batch in rows().split(50):
        ours.partial_fit(batch.float())
        theirs.partial_fit(batch.float())
    assert_close(ours.components_, theirs.components_, rtol=1e-4, atol=1e-4)
    assert ours.transform(rows()).shape == (150, 5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="n_components"):
        IncrementalPCA(lowrank=True)
    with pytest.raises(ConfigError, match="lowrank_q=2"):
        IncrementalPCA(4, lowrank=True, lowrank_q=2)
    with pytest.raises(ConfigError, match="n_components=4"):
        IncrementalPCA(4).fit(torch.zeros(3, 8))
    fitted = IncrementalPCA(2).fit(rows())
    with pytest.raises(MismatchError, match="9 features"):
        fitted.partial_fit(torch.zeros(5, 9))
