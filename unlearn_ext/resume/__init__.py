"""Passes over data that go on where they were interrupted, with the bits that they would have had.

progress    a pass: which batches are done, when what they came to is written, how it is gone on with
together    the same of ranks that pass in step: files of one step on all of them
store       the file: written all or nothing, the one before kept, verified when read
random      states of random generators, in a form that can be written
interrupts  a signal to end, which waits for the next batch
"""

from unlearn_ext.resume.progress import Progress, State
from unlearn_ext.resume.together import SharedProgress

__all__ = ["Progress", "SharedProgress", "State"]
