"""Which source knows targets of a screen's drugs, and how far sources agree: `python benchmarks/drugs.py drugs.parquet mechanisms.tsv hub.txt`. No limit."""
import sys

import pandas as pd

from perturb_research.core import project_root
from perturb_research.data.chembl import agreement, drugs_in_table, facts, read_source, read_table, resolve, with_structures

if __name__ == '__main__':
    own = drugs_in_table(sys.argv[1])
    asked, unreadable, several = with_structures(own)
    reference = project_root()/'data'/'reference'
    given = [own, facts(read_table(reference/'drugs.csv'), 'reference'), facts(read_table(reference/'drug_synonyms.csv'), 'synonyms')]
    given += [read_source(path, asked) for path in sys.argv[2:]]
    table, edges = resolve(asked, given)
    sources = [rows['source'].iloc[0] for rows in given if rows['gene'].any()]
    print(f"{len(table)} drugs, {(table['smiles'] != '').sum()} with a structure ({len(unreadable)} unreadable, {len(several)} with several), {(table['targets'] != '').sum()} with a target, "
          f"{(table['ambiguous_with'] != '').sum()} with a namesake or several candidates")
    levels = edges.drop_duplicates(['drug', 'source']).groupby(['source', 'matched_by']).size().unstack(fill_value=0).reindex(sources)
    print(levels.assign(drugs=levels.sum(axis=1)).to_string())
    print(agreement(edges, sources).round(3).to_string(index=False))
    without = own[~own['name'].isin(own.loc[own['gene'] != '', 'name'])]['name'].unique()
    print(f"without a target in {sys.argv[1].rpartition('/')[2]}: {len(without)}, of which {pd.Series(without).isin(edges['drug']).sum()} have one from elsewhere")
