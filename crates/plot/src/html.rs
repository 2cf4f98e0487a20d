//! `index.html`: every experiment on one page that needs nothing but itself.

use std::fmt::Write;

use crate::claims::Outcome;
use crate::draw;
use crate::error::Result;
use crate::markdown::facts;
use crate::report::Report;
use crate::verdict;
use crate::views::{View, of_paper};

const CSS: &str = include_str!("../assets/page.css");
const JS: &str = include_str!("../assets/page.js");

/// A table with a cell of more characters is shown row by row where there is little room.
const WORDY: usize = 60;

/// Tables with more rows than this scroll in a box of their own.
const TALL: usize = 24;
/// Longer tables are for programs.
const MOST_ROWS: usize = 600;

/// The page over `reports`, in their order; `problems` are experiments that could not be read.
pub(crate) fn render(reports: &[Report], problems: &[String]) -> Result<String> {
    let mut nav = String::new();
    let mut body = overview(reports, problems);
    for report in reports {
        let data = &report.data;
        let _ = writeln!(
            nav,
            "<li><a href=\"#{0}\" title=\"{1}\">{0}</a></li>",
            escaped(&data.id),
            escaped(data.title())
        );
        body += &section(report)?;
    }
    let mut models: Vec<&str> = Vec::new();
    for report in reports {
        for name in report.data.cells.distinct("model", &report.data.cells.all()) {
            let label = report.data.info.as_ref().and_then(|i| i.models.get(&name)).map(|m| m.label.as_str());
            if let Some(label) = label.filter(|l| !l.is_empty() && !models.contains(l)) {
                models.push(label);
            }
        }
    }
    let count = reports.len();
    let plural = if count == 1 { "experiment" } else { "experiments" };
    let on = if models.is_empty() { String::new() } else { format!(" on {}", escaped(&models.join(", "))) };
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>MiniCache results</title>\n<link rel=\"icon\" href=\"data:,\">\n<style>\n{CSS}</style>\n</head>\n\
         <body>\n<a class=\"skip\" href=\"#main\">To the results</a>\n\
         <header><h1>MiniCache results</h1><p>{count} {plural}{on}</p>\
         <button class=\"theme\" type=\"button\" hidden>Theme: auto</button></header>\n\
         <nav aria-label=\"Experiments\"><ol>\n<li><a href=\"#overview\">Overview</a></li>\n{nav}</ol></nav>\n\
         <main id=\"main\">\n{body}</main>\n<script>\n{JS}</script>\n</body>\n</html>\n"
    ))
}

fn overview(reports: &[Report], problems: &[String]) -> String {
    let mut out = "<section id=\"overview\">\n<h2>Overview</h2>\n".to_string();
    for problem in problems {
        let _ = writeln!(out, "<p class=\"incomplete\">{}</p>", escaped(problem));
    }
    if reports.is_empty() {
        return out + "<p>No results yet.</p>\n</section>\n";
    }
    let verdicts = verdict::all(reports);
    if !verdicts.is_empty() {
        let _ = writeln!(out, "<p>{}</p>", escaped(&verdict::summary(&verdicts)));
        table(&mut out, &verdict::table(&verdicts), true);
        let wanted = verdict::wanted(&verdicts);
        if !wanted.is_empty() {
            let items: String = wanted.iter().map(|line| format!("<li>{}</li>", inline(line))).collect();
            let _ = writeln!(out, "<details><summary>What would tell</summary><ul>{items}</ul></details>");
        }
    }
    out += "<div class=\"scroll\"><table class=\"stacks\">\n<thead><tr><th scope=\"col\">Experiment</th><th scope=\"col\">Shows</th>\
            <th scope=\"col\">Rows</th><th scope=\"col\">The paper's claims here</th></tr></thead>\n<tbody>\n";
    for report in reports {
        let data = &report.data;
        let state =
            if data.incomplete().is_some() { "<br><span class=\"note\">incomplete</span>" } else { "" };
        let judged = report.verdicts.iter().map(|v| badge(v.outcome())).collect::<Vec<_>>().join(" ");
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\"><a href=\"#{0}\">{0}</a></th><td>{1}{state}</td><td class=\"n\" data-label=\"rows\">{2}</td><td>{judged}</td></tr>",
            escaped(&data.id),
            escaped(data.title()),
            data.cells.rows.len(),
        );
    }
    out + "</tbody></table></div>\n</section>\n"
}

fn badge(outcome: Outcome) -> String {
    let class = match outcome {
        Outcome::Reproduced => "good",
        Outcome::Partly => "fair",
        Outcome::NotReproduced => "bad",
        Outcome::Open => "open",
    };
    format!("<span class=\"badge {class}\">{}</span>", outcome.label())
}

fn section(report: &Report) -> Result<String> {
    let data = &report.data;
    let id = escaped(&data.id);
    let own = if data.title() == data.id { String::new() } else { format!("<span class=\"id\">{id}</span>") };
    let mut out = format!("<section id=\"{id}\">\n<h2>{}{own}</h2>\n", escaped(data.title()));
    if let Some(reason) = data.incomplete() {
        let _ = writeln!(out, "<p class=\"incomplete\">Incomplete. {}</p>", escaped(&reason));
    }
    for paragraph in data.info.iter().flat_map(|i| i.experiment.notes.split("\n\n")) {
        if !paragraph.trim().is_empty() {
            let _ = writeln!(out, "<p>{}</p>", inline(paragraph.trim()));
        }
    }
    for note in data.notes.iter().chain(&data.samples).chain(&report.notes) {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", inline(note));
    }
    for paper in data.papers.iter().filter(|p| !p.claim.is_empty()) {
        let _ = writeln!(out, "<p><b>The paper’s claim.</b> {}</p>", inline(&paper.claim));
    }
    if !report.verdicts.is_empty() {
        out += "<p><b>Measured here.</b></p>\n<ul>\n";
        for verdict in &report.verdicts {
            let _ = writeln!(out, "<li>{} {}</li>", inline(&verdict.sentences()), badge(verdict.outcome()));
        }
        out += "</ul>\n";
    }
    if let Some(front) = &report.front {
        let _ = writeln!(out, "<p>{}</p>", inline(front));
    }
    for (figure, alt) in &report.figures {
        let svg = themed(&draw::svg(figure)?, alt);
        let width = draw::width(figure);
        let notes =
            figure.captions.iter().chain(&figure.notes).map(|n| inline(n)).collect::<Vec<_>>().join(" ");
        let caption =
            if notes.is_empty() { String::new() } else { format!("<figcaption>{notes}</figcaption>") };
        let _ = writeln!(out, "<figure style=\"max-width:{width}px\">{svg}{caption}</figure>");
    }
    for (i, view) in report.views.iter().enumerate() {
        table(&mut out, view, i == 0);
    }
    for paper in &data.papers {
        table(&mut out, &of_paper(paper), false);
    }
    out += "<h3>What was run</h3>\n<dl>";
    for (name, value) in facts(data) {
        let _ = write!(out, "<dt>{}</dt><dd>{}</dd>", escaped(&name), escaped(&value));
    }
    out += "</dl>\n";
    if let Some(info) = &data.info {
        if !info.command.is_empty() {
            let _ = writeln!(out, "<pre><code>{}</code></pre>", escaped(info.command.trim()));
        }
        let mut shown = info.experiment.clone();
        // how the report looks is not how the run went
        shown.plots.clear();
        shown.paper.clear();
        shown.profiles.clear();
        shown.notes.clear();
        if let Ok(text) = toml::to_string(&shown) {
            let _ = writeln!(
                out,
                "<details><summary>Configuration</summary><pre><code>{}</code></pre></details>",
                escaped(text.trim())
            );
        }
    }
    Ok(out + "</section>\n")
}

fn table(out: &mut String, view: &View, open: bool) {
    if view.rows.is_empty() {
        return;
    }
    let title = if view.title.is_empty() { "Cells" } else { &view.title };
    let open = if open || view.rows.len() <= TALL { " open" } else { "" };
    let _ = writeln!(out, "<details{open}><summary>{}, {} rows</summary>", escaped(title), view.rows.len());
    if !view.caption.is_empty() {
        let _ = writeln!(out, "<p class=\"caption\">{}</p>", inline(&view.caption));
    }
    // Sentences have no room side by side on a phone.
    let wordy = view.rows.iter().flatten().any(|value| value.text.chars().count() > WORDY);
    let stacks = if wordy { " stacks" } else { "" };
    let tall = if view.rows.len() > TALL { " tall" } else { "" };
    let _ = write!(
        out,
        "<div class=\"scroll{tall}\" tabindex=\"0\" role=\"region\" aria-label=\"{}\"><table class=\"sortable{stacks}\">\n<thead><tr>",
        escaped(title)
    );
    for column in &view.columns {
        let class = if column.numeric { " class=\"n\"" } else { "" };
        let _ = write!(out, "<th scope=\"col\"{class}>{}</th>", escaped(&column.label));
    }
    *out += "</tr></thead>\n<tbody>\n";
    let (rows, more) = view.head(MOST_ROWS);
    for row in rows {
        *out += "<tr>";
        for (i, (value, column)) in row.iter().zip(&view.columns).enumerate() {
            let (tag, scope) = if i == 0 { ("th", " scope=\"row\"") } else { ("td", "") };
            let class = if column.numeric { " class=\"n\"" } else { "" };
            let sort = value.sort.map_or(String::new(), |x| format!(" data-v=\"{x}\""));
            let label =
                if wordy { format!(" data-label=\"{}\"", escaped(&column.label)) } else { String::new() };
            let _ = write!(out, "<{tag}{scope}{class}{sort}{label}>{}</{tag}>", escaped(&value.text));
        }
        *out += "</tr>\n";
    }
    *out += "</tbody></table></div>\n";
    if let Some(more) = more {
        let _ = writeln!(out, "<p class=\"caption\">{}</p>", inline(&more));
    }
    *out += "</details>\n";
}

/// The figure with the page's colours and its description.
fn themed(svg: &str, alt: &str) -> String {
    let mut out = svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{}\" ", escaped(alt)), 1);
    for (color, variable) in draw::variables() {
        out = out.replace(&color, &variable);
    }
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Text with Markdown's code spans; everything else is shown as it is.
fn inline(text: &str) -> String {
    let text = escaped(text);
    let mut out = String::with_capacity(text.len());
    for (i, part) in text.split('`').enumerate() {
        let closed = i % 2 == 1 && i < text.matches('`').count();
        match (i % 2 == 1, closed) {
            (true, true) => {
                let _ = write!(out, "<code>{part}</code>");
            }
            (true, false) => {
                let _ = write!(out, "`{part}");
            }
            _ => out += part,
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_break_the_page() {
        assert_eq!(escaped("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
        assert_eq!(inline("a `b<c` d `e"), "a <code>b&lt;c</code> d `e");
    }
}
