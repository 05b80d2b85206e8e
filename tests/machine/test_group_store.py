"""Whoever holds the store may be gone: that is another process lost, not an error that nobody foresaw."""

import pytest

from khanhllm.errors import UserError
from khanhllm.machine.group import Group, Lost


class Gone:
    """A store whose process has ended."""

    def fail(self, *_):
        raise RuntimeError("Connection was likely closed")

    check = wait = get = set = add = fail


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_is_gone_is_a_lost_process(rank):
    group = Group(rank, 2, store=Gone())
    with pytest.raises(Lost, match="--resume goes on"):
        group.told(lambda: 1)
    group.tell_the_end(UserError("the cause"))  # says nothing, and hides no cause
