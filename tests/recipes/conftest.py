"""For tests of recipes: rewards and judges of images that are quickly trained."""

from functools import partial

import pytest

from rgdiff.domains.images import data


@pytest.fixture(autouse=True, scope="package")
def rough_classifiers():
    """What they think of images matters to no test here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "train_classifier", partial(data.train_classifier, steps=20))
        yield
