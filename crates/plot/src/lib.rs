//! CSV results to PNG and SVG figures, report.md and one HTML page.
