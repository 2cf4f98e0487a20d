//! One experiment's figures, tables and verdict, and the files they make.

use std::path::Path;

use minicache_config::atomic;

use crate::alt;
use crate::build;
use crate::claims::{self, Verdict};
use crate::data::Data;
use crate::draw;
use crate::error::{self, Result};
use crate::figure::Figure;
use crate::front;
use crate::markdown;
use crate::views::{self, View};

/// Everything that the reports show of one experiment.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    /// What was read.
    pub(crate) data: Data,
    /// Figures with their descriptions.
    pub(crate) figures: Vec<(Figure, String)>,
    /// Tables.
    pub(crate) views: Vec<View>,
    /// What the rows say about the paper's claims.
    pub(crate) verdicts: Vec<Verdict>,
    /// What is lost for what is saved, in a sentence.
    pub(crate) front: Option<String>,
    /// Figures that could not be made, and why.
    pub(crate) notes: Vec<String>,
}

impl Report {
    /// Reads the results folder `dir`.
    pub(crate) fn of(dir: &Path, paper_dir: Option<&Path>) -> Result<Self> {
        let data = Data::load(dir, paper_dir)?;
        let mut figures = Vec::new();
        let mut notes = Vec::new();
        for plot in data.info.iter().flat_map(|i| &i.experiment.plots) {
            let built = build::build(plot, &data).and_then(|figure| {
                draw::check_size(&figure)?;
                Ok(figure)
            });
            match built {
                Ok(figure) => {
                    let alt = alt::describe(&figure);
                    figures.push((figure, alt));
                }
                Err(reason) => notes.push(format!("The figure `{}` is left out: {reason}.", plot.name)),
            }
        }
        let views = views::of(&data);
        let (verdicts, front) = (claims::of(&data), front::sentence(&data));
        Ok(Self { data, figures, views, verdicts, front, notes })
    }

    /// Writes figures and `report.md` into `dir`.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let write = |name: String, bytes: &[u8]| {
            let path = dir.join(name);
            atomic::replace(&path, bytes).map_err(error::io(&path, "write"))
        };
        for (figure, _) in &self.figures {
            write(format!("{}.svg", figure.name), draw::svg(figure)?.as_bytes())?;
            write(format!("{}.png", figure.name), &draw::png(figure)?)?;
        }
        write("report.md".into(), markdown::render(self).as_bytes())
    }
}
