//! Rebuilds the reports of a results folder: `cargo run -p minicache-plot --example report -- results`.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let folder = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| "results".into()));
    let paper = std::env::args().nth(2).map(PathBuf::from);
    match minicache_plot::report(&folder, paper.as_deref()) {
        Ok(summary) => {
            for one in &summary.experiments {
                println!("{}: {} figures in {}", one.id, one.figures, one.path.display());
                one.notes.iter().for_each(|note| println!("  {note}"));
            }
            for problem in &summary.problems {
                eprintln!("{problem}");
            }
            if summary.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(2) }
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}
