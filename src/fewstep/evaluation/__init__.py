"""Judging samplers and models: comparisons on the same noise, log-densities, bits per dimension."""

from .bits import bits_per_dim as bits_per_dim
from .comparison import RESAMPLES as RESAMPLES
from .comparison import Estimate as Estimate
from .comparison import Group as Group
from .comparison import Metric as Metric
from .comparison import Report as Report
from .comparison import Row as Row
from .comparison import compare as compare
from .comparison import frechet as frechet
from .comparison import markdown_cell as markdown_cell
from .comparison import measure as measure
from .comparison import squared_errors as squared_errors
from .divergence import DivergenceRule as DivergenceRule
from .flow import LogDensity as LogDensity
from .likelihood import Sampled as Sampled
from .likelihood import log_density as log_density
from .likelihood import sample_with_log_density as sample_with_log_density
from .likelihood import score as score
from .solve import Solver as Solver
