"""The errors that users see; importing them costs nothing."""


class FewstepError(Exception):
    """Anything that the user can mend; the message says what was expected, what came and what to do."""


class FieldError(FewstepError):
    """The network gave something that no sampler can use: a wrong shape, a wrong dtype, NaN."""


class NotLinearError(FewstepError):
    """A method or scheduler whose states are not fixed linear combinations of the noise and the outputs."""


class ArtifactError(FewstepError):
    """A sampler directory that is not what fewstep wrote, or does not belong to this model."""


class GridError(FewstepError, ValueError):
    """Step times that no method can walk."""


class BudgetError(FewstepError, ValueError):
    """A number of network calls that this method or scheduler cannot spend exactly."""
