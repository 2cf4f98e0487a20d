//! From an experiment to its cells: models x tasks x variants x swept keys.

use indexmap::{IndexMap, IndexSet};
use minicache_core::CacheSpec;

use crate::bounds::MOST_CELLS;
use crate::experiment::{cache_of, set, typed};
use crate::{ConfigError, Experiment, Kind, ModelSettings, Result};

/// One cell of an experiment's plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    /// Model name as in the experiment.
    pub model: String,
    /// How it is loaded.
    pub settings: ModelSettings,
    /// Task name; empty for kinds without tasks.
    pub task: String,
    /// Variant name, or the cache's label.
    pub variant: String,
    /// The cache.
    pub cache: CacheSpec,
    /// The swept keys of this cell in file order: dotted key to value, printed as TOML.
    pub swept: IndexMap<String, String>,
}

/// The plan, in order: models, tasks, variants, then the sweep with the last key fastest. Cells that mean the same
/// (a swept key that the method does not read) appear once.
///
/// # Errors
/// A swept or variant key that does not exist, or an impossible value.
pub fn cells(experiment: &Experiment) -> Result<Vec<Cell>> {
    let one = [String::new()];
    let models: IndexSet<&String> = experiment.models.iter().collect();
    let tasks: IndexSet<&String> =
        if experiment.tasks.is_empty() { one.iter().collect() } else { experiment.tasks.iter().collect() };
    let mut distinct: Vec<(Cell, CacheSpec)> = Vec::new();
    for cell in variants(experiment)? {
        let meant = cell.cache.canonical(None);
        if !distinct.iter().any(|(c, known)| *known == meant && c.settings == cell.settings) {
            distinct.push((cell, meant));
        }
    }
    let count = [models.len(), tasks.len(), distinct.len()].into_iter().fold(1, usize::saturating_mul);
    if count > MOST_CELLS {
        let message =
            format!("comes to {count} cells with all models and tasks, at most {MOST_CELLS} are run");
        return Err(ConfigError::new("sweep", message));
    }
    let mut plan: Vec<Cell> = Vec::with_capacity(count);
    for model in models {
        for &task in &tasks {
            let cell = |v: &Cell| Cell { model: model.clone(), task: task.clone(), ..v.clone() };
            plan.extend(distinct.iter().map(|(v, _)| cell(v)));
        }
    }
    Ok(plan)
}

/// Every variant with every combination of swept values, with model and task still open.
fn variants(experiment: &Experiment) -> Result<Vec<Cell>> {
    let mut out = Vec::new();
    let plain = crate::Variant {
        name: None,
        cache: toml::Table::new(),
        model: toml::Table::new(),
        sweep: IndexMap::new(),
    };
    let listed = if experiment.variants.is_empty() { vec![plain] } else { experiment.variants.clone() };
    let settings =
        toml::Table::try_from(&experiment.model).map_err(|e| ConfigError::new("model", e.to_string()))?;
    for (index, variant) in listed.iter().enumerate() {
        let mut base = toml::Table::new();
        let mut cache = merged(&experiment.cache, &variant.cache);
        if experiment.kind == Kind::Similarity {
            // What is looked at there are the pairs that a merge would take.
            cache.entry("method").or_insert_with(|| "minicache".into());
        }
        base.insert("cache".into(), cache.into());
        base.insert("model".into(), merged(&settings, &variant.model).into());
        let place = |e: ConfigError| {
            if experiment.variants.is_empty() { e } else { e.under(&format!("variants.{index}")) }
        };
        let mut sweep = experiment.sweep.clone();
        sweep.extend(variant.sweep.clone());
        // An error of a swept value points at the sweep that has it, any other at the variant or `[cache]`.
        let blame = |e: ConfigError| {
            if variant.sweep.contains_key(&e.key) {
                place(e.under("sweep"))
            } else if sweep.contains_key(&e.key) {
                e.under("sweep")
            } else {
                place(e)
            }
        };
        for (swept, table) in combinations(&base, &sweep)? {
            let (cache, model) = split(table);
            let cache = cache_of(cache).map_err(blame)?;
            // Keys of `[cache]` are for whichever variant reads them; a variant's own have to do something.
            let own = if experiment.variants.is_empty() { &experiment.cache } else { &variant.cache };
            if !sweep.contains_key("cache.method") {
                let own = own.keys().map(String::as_str);
                cache.check_reads(own).map_err(|e| blame(ConfigError::from(e.under("cache"))))?;
            }
            let settings: ModelSettings = typed(model, "model").map_err(blame)?;
            if let Some(align) = &settings.align {
                align.validate().map_err(|e| blame(e.under("model.align").into()))?;
            }
            let name = variant.name.clone().unwrap_or_else(|| cache.label());
            let read = |key: &str| key.strip_prefix("cache.").is_none_or(|k| cache.reads(k));
            let swept = swept.into_iter().filter(|(k, _)| read(k)).collect();
            let (model, task) = (String::new(), String::new());
            out.push(Cell { model, settings, task, variant: name, cache, swept });
        }
    }
    Ok(out)
}

fn split(mut table: toml::Table) -> (toml::Table, toml::Table) {
    let mut take = |key: &str| match table.remove(key) {
        Some(toml::Value::Table(t)) => t,
        _ => toml::Table::new(),
    };
    (take("cache"), take("model"))
}

/// `base` with the keys of `over` on top, tables merged key by key.
fn merged(base: &toml::Table, over: &toml::Table) -> toml::Table {
    let mut out = base.clone();
    for (key, value) in over {
        match (out.get_mut(key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(new)) => *inner = merged(inner, new),
            _ => {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    out
}

type Combination = (IndexMap<String, String>, toml::Table);

fn combinations(base: &toml::Table, sweep: &IndexMap<String, Vec<toml::Value>>) -> Result<Vec<Combination>> {
    let count = sweep.values().map(Vec::len).fold(1, usize::saturating_mul);
    if count > MOST_CELLS {
        let message = format!("{count} combinations of swept values, at most {MOST_CELLS} are run");
        return Err(ConfigError::new("sweep", message));
    }
    let mut out = vec![(IndexMap::new(), base.clone())];
    for (key, values) in sweep {
        if !(key.starts_with("cache.") || key.starts_with("model.")) {
            let message = "only keys below `cache.` and `model.` can be swept";
            return Err(ConfigError::new(format!("sweep.{key}"), message));
        }
        let mut next = Vec::with_capacity(out.len() * values.len());
        for (swept, table) in &out {
            for value in values {
                let (mut swept, mut table) = (swept.clone(), table.clone());
                set(&mut table, key, value.clone()).map_err(|e| e.under("sweep"))?;
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                swept.insert(key.clone(), text);
                next.push((swept, table));
            }
        }
        out = next;
    }
    Ok(out)
}
