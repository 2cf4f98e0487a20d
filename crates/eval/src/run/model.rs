//! A model that is loaded for a run, with its alignment, its bases and what is chosen for it.

use minicache_config::{Align, ConfigError, ModelSettings};
use minicache_core::CacheSpec;
use minicache_core::settings::Calibration;
use minicache_models::align::AlignOptions;
use minicache_models::{LoadOptions, Model};

use super::calibration::{self, CalibrationText, Corpus};
use super::choose::Choices;
use super::key::cache_json;
use super::plan::Planned;
use super::work::Run;
use super::{Context, Result};

/// A model that is loaded, and the cells that it is ready for.
pub(super) struct Ready {
    name: String,
    pub(super) model: Model,
    pub(super) cells: Vec<Planned>,
}

/// A model that an experiment leaves to the next one.
pub struct Kept {
    name: String,
    settings: ModelSettings,
    model: Model,
}

impl Ready {
    /// Leaves the model to the next experiment, as it was loaded: not where it was calibrated or aligned on text beside
    /// what this experiment measures on.
    pub(super) fn keep(self, context: &Context, settings: &ModelSettings) {
        let Self { name, model, cells } = self;
        let plain = settings.align.is_none() && cells.iter().all(|p| p.cell.cache.calibration().is_none());
        *context.kept.borrow_mut() = plain.then(|| Kept { name, settings: settings.clone(), model });
    }
}

impl Run<'_> {
    /// The model `model` with what `cells` need of it; `None` where it cannot be made ready, and then they have failed.
    pub(super) fn ready(
        &mut self,
        model: &str,
        settings: &ModelSettings,
        cells: &[Planned],
    ) -> Result<Option<Ready>> {
        let mut prepared = cells.to_vec();
        match self.load(model, settings, &mut prepared) {
            Ok(loaded) => {
                self.about.add(model, &loaded, settings);
                self.describe()?;
                Ok(Some(Ready { name: model.to_string(), model: loaded, cells: prepared }))
            }
            Err(error) => {
                self.fail(cells, error.in_cell(format!("{}, {model}", self.plan.experiment.id)))?;
                Ok(None)
            }
        }
    }

    /// Loads the model. Cells whose cache cannot be made fail here, before anything is computed; what the others leave to
    /// choice is chosen.
    fn load(&mut self, model: &str, settings: &ModelSettings, cells: &mut Vec<Planned>) -> Result<Model> {
        self.context.stop.check()?;
        let options = LoadOptions { weights: settings.weights, ..self.context.load.clone() };
        let kept = self.context.kept.take().filter(|kept| kept.name == model && kept.settings == *settings);
        let mut loaded = match kept {
            Some(kept) => kept.model,
            None => {
                self.overall.say(format!("{} {model}: loading", self.plan.experiment.id));
                Model::load(model, &options)?
            }
        };
        for p in &*cells {
            p.cell
                .cache
                .validate_for(loaded.decoder.shape())
                .map_err(|e| ConfigError::from(e.under("cache")))?;
        }
        if settings.align.is_none() && cells.iter().all(|p| p.cell.cache.calibration().is_none()) {
            return Ok(loaded);
        }
        let measured = self.plan.measured(loaded.need_tokenizer()?, self.context)?;
        let corpus = Corpus::beside(&self.context.data, measured, &self.context.stop);
        if let Some(Align { text: calibration, level }) = &settings.align {
            let what = calibration::describe(calibration);
            self.overall.say(format!("{} {model}: aligning on {what}", self.plan.experiment.id));
            self.context.stop.check()?;
            let text = CalibrationText::read(calibration, &loaded, &corpus)?;
            let alignment = loaded.alignment(text.chunks(), AlignOptions { level: *level })?;
            drop(loaded);
            loaded = Model::load_aligned(model, &options, &alignment)?;
            self.about.add_calibration(what, text.origin());
        }
        self.calibrate(&loaded, cells, model, &corpus)?;
        self.choose(&loaded, cells, model, &corpus)?;
        Ok(loaded)
    }

    /// Makes the bases that `cells` need. Those for which there can be none fail and are taken out.
    fn calibrate(
        &mut self,
        loaded: &Model,
        cells: &mut Vec<Planned>,
        model: &str,
        corpus: &Corpus<'_>,
    ) -> Result<()> {
        let mut texts: Vec<Calibration> = Vec::new();
        for text in cells.iter().filter_map(|p| p.cell.cache.calibration()) {
            if !texts.contains(text) {
                texts.push(text.clone());
            }
        }
        for text in texts {
            let what = calibration::describe(&text);
            self.overall.say(format!("{} {model}: calibrating on {what}", self.plan.experiment.id));
            let of_text = |p: &&Planned| p.cell.cache.calibration() == Some(&text);
            let caches = cells.iter().filter(of_text).map(|p| &p.cell.cache);
            match calibration::prepare(loaded, caches, corpus, &self.context.stop) {
                Ok(origin) => origin.into_iter().for_each(|o| self.about.add_calibration(what.clone(), o)),
                Err(error) => {
                    let failed: Vec<Planned> = cells.iter().filter(of_text).cloned().collect();
                    cells.retain(|p| !of_text(&p));
                    let place = format!("{}, {model}, calibrating on {what}", self.plan.experiment.id);
                    self.fail(&failed, error.in_cell(place))?;
                }
            }
        }
        Ok(())
    }

    /// Puts what was chosen in place of `auto` in `cells`. Those for which nothing can be chosen fail and are taken out.
    fn choose(
        &mut self,
        loaded: &Model,
        cells: &mut Vec<Planned>,
        model: &str,
        corpus: &Corpus<'_>,
    ) -> Result<()> {
        let mut measured = Choices::default();
        let mut choices: Vec<(CacheSpec, Option<CacheSpec>)> = Vec::new();
        for Planned { cell, .. } in cells.iter().filter(|p| p.cell.cache.is_auto()) {
            if choices.iter().any(|(auto, _)| *auto == cell.cache) {
                continue;
            }
            let place = format!("{}, {model}, choosing for {}", self.plan.experiment.id, cell.variant);
            self.overall.say(place.clone());
            self.context.stop.check()?;
            let chosen = match measured.resolve(loaded, &cell.cache, corpus) {
                Ok(chosen) => {
                    let json = cache_json(&chosen, loaded.decoder.shape().layers).to_string();
                    self.about.add_chosen(&cell.variant, model, json);
                    Some(chosen)
                }
                Err(error) => {
                    let failed: Vec<Planned> =
                        cells.iter().filter(|p| p.cell.cache == cell.cache).cloned().collect();
                    self.fail(&failed, error.in_cell(place))?;
                    None
                }
            };
            choices.push((cell.cache.clone(), chosen));
        }
        for (auto, chosen) in choices {
            match chosen {
                Some(chosen) => {
                    let of_choice = cells.iter_mut().filter(|p| p.cell.cache == auto);
                    of_choice.for_each(|p| p.cell.cache = chosen.clone());
                }
                None => cells.retain(|p| p.cell.cache != auto),
            }
        }
        Ok(())
    }
}
