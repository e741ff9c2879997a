"""Census income (KDD): the Current Population Surveys of 1994 and 1995, three binary tasks.

UCI Machine Learning Repository, "Census-Income (KDD)". The tasks are those of Ma et al., Modeling task relationships in
multi-task learning with multi-gate mixture-of-experts (KDD 2018), who pair the second with either of the others:

| task | class 1 |
|---|---|
| income | more than 50,000 dollars |
| never_married | marital status "Never married" |
| college | education of some college or more |

Features: 7 numbers (age, wage per hour, capital gains and losses, dividends, size of the employer, weeks worked) and 31
columns of categories, among them the codes of industry and occupation. No features: the tasks' own columns (all three,
whichever tasks are chosen), and `instance_weight`, which says how many people a row stands for; rows count alike here,
as in the paper. Columns that tell much of a task are left in, as there (`tax_filer_stat`, `det_hh_fam_stat`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_bilb.data.own.options import SplitOptions
from hf_bilb.data.tables.binary import BinaryTask, Layout, load_binary
from hf_bilb.data.tables.options import TableOptions
from hf_bilb.data.task_data import DataSetSpec, TaskData

LAYOUT = Layout(
    columns=(
        "age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college",
        "marital_stat", "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex", "union_member",
        "unemp_reason", "full_or_part_emp", "capital_gains", "capital_losses", "stock_dividends", "tax_filer_stat",
        "region_prev_res", "state_prev_res", "det_hh_fam_stat", "det_hh_summ", "instance_weight", "mig_chg_msa",
        "mig_chg_reg", "mig_move_reg", "mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father",
        "country_mother", "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits",
        "weeks_worked", "year", "income_50k",
    ),
    numbers=(
        "age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "weeks_worked",
    ),
    left_out=("instance_weight",),
    tasks={
        "income": BinaryTask("income_50k", ("50000+.",), ("- 50000.",)),
        "never_married": BinaryTask(
            "marital_stat",
            ("Never married",),
            ("Divorced", "Married-A F spouse present", "Married-civilian spouse present", "Married-spouse absent",
             "Separated", "Widowed"),
        ),
        "college": BinaryTask(
            "education",
            ("Some college but no degree", "Associates degree-academic program",
             "Associates degree-occup /vocational", "Bachelors degree(BA AB BS)",
             "Masters degree(MA MS MEng MEd MSW MBA)", "Prof school degree (MD DDS DVM LLB JD)",
             "Doctorate degree(PhD EdD)"),
            ("Children", "Less than 1st grade", "1st 2nd 3rd or 4th grade", "5th or 6th grade", "7th and 8th grade",
             "9th grade", "10th grade", "11th grade", "12th grade no diploma", "High school graduate"),
        ),
    },
)  # fmt: skip
TASKS = tuple(LAYOUT.tasks)


@dataclass(frozen=True)
class CensusOptions(TableOptions):
    """`TableOptions`; all tasks are three.

    `file` is of comma-separated values, with or without the columns' names in its first line; it may be packed (`.xz`,
    `.gz`): `census-income.data` or `census-income.test` of the repository, or both joined.
    """

    known_tasks = TASKS


def load_census(options: CensusOptions) -> TaskData:
    """Census income with `features` and `labels [K]`; some seconds for 80,000 rows.

    Raises:
        OptionError: there is no such file; see `load_binary`.
    """
    split = SplitOptions(options.validation_fraction, options.test_fraction, seed=options.seed)
    return load_binary(LAYOUT.options(str(options.path), options.tasks, split))


SPEC = DataSetSpec(options=CensusOptions, load=load_census)
