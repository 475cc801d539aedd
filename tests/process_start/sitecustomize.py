"""Read by each Python process of the tests at its start, since ``conftest.py`` puts it on the path.

What imports make stays: looking through it for garbage is a seventh of the time that they take.
"""

import gc

gc.set_threshold(50_000, 20, 20)
