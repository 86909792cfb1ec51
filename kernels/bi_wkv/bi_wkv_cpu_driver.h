// Splits Bi-WKV into tasks and runs the phases of bi_wkv_cpu_kernel.h. Included once for each vector width.

// Buffers of one sequence (a vector of channels of one sample): an entry for each chunk.
template <typename Real>
struct Work {
    Summary<Real>*sums, *adjoint_sums;
    Border<Real>*borders, *adjoint_borders;
    Row<Real>*gw, *gu;
};

enum class Phase { summarise, chain, write_y, summarise_adjoint, chain_adjoint, write_gradients, reduce };

constexpr Phase kForward[] = {Phase::summarise, Phase::chain, Phase::write_y};
constexpr Phase kBackward[] = {Phase::summarise,     Phase::chain,           Phase::summarise_adjoint,
                               Phase::chain_adjoint, Phase::write_gradients, Phase::reduce};

inline bool runs_by_chunk(Phase phase) {
    return phase != Phase::chain && phase != Phase::chain_adjoint && phase != Phase::reduce;
}

constexpr int64_t kShort = 8;  // chunks

template <typename Real>
class Run {
 public:
    Run(const Args<Real>& args, bool backward)
        : args_(args), backward_(backward), exact_(args.channels), redo_(args.batch * args.channels) {
        cut();
        for (int64_t block = 0; block * kLanes<Real> < args.channels; ++block) {
            channels_.emplace_back(args, exact_, block);
        }
        if (backward) totals_.resize(2 * args.batch * args.channels);
        for (int64_t i = 0; i < args.batch * args.channels; ++i) redo_[i] = exact_[i % args.channels];
    }

    // Short sequences are tasks of their own, if there are enough of them: they stay in the cache from phase to phase.
    // Else each phase runs over all chunks before the next phase. The arithmetic is the same, so neither this choice
    // nor the number of threads changes a bit of the result.
    void operator()() {
        const int64_t sequences = args_.batch * blocks();
        if (chunks_.count == 1 || (chunks_.count <= kShort && sequences >= 4 * at::get_num_threads())) {
            at::parallel_for(0, sequences, 1, [this](int64_t begin, int64_t end) { run_sequences(begin, end); });
        } else {
            by_sequence_ = false;
            run_by_phase();
        }
        redo_exactly();
        if (backward_) sum_over_batch();
    }

 private:
    struct Buffers {
        std::unique_ptr<Summary<Real>[]> sums, adjoint_sums;
        std::unique_ptr<Border<Real>[]> borders, adjoint_borders;
        std::unique_ptr<Row<Real>[]> gw, gu;

        Buffers(int64_t count, bool backward) : sums(new Summary<Real>[count]), borders(new Border<Real>[count]) {
            if (!backward) return;
            adjoint_sums.reset(new Summary<Real>[count]);
            adjoint_borders.reset(new Border<Real>[count]);
            gw.reset(new Row<Real>[count]);
            gu.reset(new Row<Real>[count]);
        }

        Work<Real> at(int64_t i) {
            return {sums.get() + i, adjoint_sums.get() + i, borders.get() + i, adjoint_borders.get() + i, gw.get() + i,
                    gu.get() + i};
        }
    };

    int64_t blocks() const { return static_cast<int64_t>(channels_.size()); }

    // Chooses the chunk length, and the channels that the exact code takes from the start.
    void cut() {
        const double shortest = static_cast<double>(std::min<int64_t>(kMinChunk, args_.tokens));
        double fastest = 0;
        for (int64_t c = 0; c < args_.channels; ++c) {
            const double w = std::abs(static_cast<double>(args_.w[c]));
            exact_[c] = !(w * shortest <= kMaxDecay && args_.u[c] <= kMaxBonus);  // also where one is NaN
            if (!exact_[c]) fastest = std::max(fastest, w);
        }
        int64_t length = std::min<int64_t>(args_.tokens, kMaxChunk);
        if (fastest * static_cast<double>(length) > kMaxDecay) length = static_cast<int64_t>(kMaxDecay / fastest);
        const int64_t count = (args_.tokens + length - 1) / length;
        length = (args_.tokens + count - 1) / count;  // about even
        chunks_ = {args_.tokens, length, (args_.tokens + length - 1) / length};
    }

    void run_sequences(int64_t begin, int64_t end) {
        Buffers buffers(chunks_.count, backward_);
        for (int64_t i = begin; i < end; ++i) {
            for_phases([&](Phase phase) {
                for (int64_t c = 0; c < (runs_by_chunk(phase) ? chunks_.count : 1); ++c) {
                    run_task(phase, i / blocks(), i % blocks(), c, buffers.at(0));
                }
            });
        }
    }

    void run_by_phase() {
        Buffers buffers(args_.batch * blocks() * chunks_.count, backward_);
        for_phases([&](Phase phase) {
            const int64_t by_sequence = runs_by_chunk(phase) ? chunks_.count : 1;
            at::parallel_for(0, args_.batch * by_sequence * blocks(), 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {  // neighbouring channels follow each other: they share pages
                    const int64_t block = i % blocks(), chunk = i / blocks() % by_sequence;
                    const int64_t sample = i / blocks() / by_sequence;
                    run_task(phase, sample, block, chunk, buffers.at((sample * blocks() + block) * chunks_.count));
                }
            });
        });
    }

    template <typename Body>
    void for_phases(const Body& body) const {
        if (backward_) {
            for (Phase phase : kBackward) body(phase);
        } else {
            for (Phase phase : kForward) body(phase);
        }
    }

    void run_task(Phase phase, int64_t sample, int64_t block, int64_t chunk, const Work<Real>& work) {
        Channels<Real> ch = channels_[block];
        ch.sequence = sample * args_.tokens * args_.channels;
        ch.ahead = chunks_.length * args_.channels;
        if (by_sequence_ && chunk == chunks_.count - 1) ch.ahead = kLanes<Real> - chunk * ch.ahead;  // next sequence
        if (phase == Phase::chain) {
            chain(ch, chunks_, work.sums, work.borders);
        } else if (phase == Phase::chain_adjoint) {
            chain(ch, chunks_, work.adjoint_sums, work.adjoint_borders);
        } else if (phase == Phase::reduce) {
            reduce(ch, sample, work);
        } else if (ch.count == kLanes<Real>) {
            run_chunk<true>(phase, ch, sample, chunk, work);
        } else {
            run_chunk<false>(phase, ch, sample, chunk, work);
        }
    }

    template <bool full>
    void run_chunk(Phase phase, const Channels<Real>& ch, int64_t sample, int64_t c, const Work<Real>& work) {
        const int64_t begin = chunks_.begin(c), tokens = chunks_.size(c);
        Mask<Real> good = ch.w() == ch.w();
        if (phase == Phase::summarise) {
            summarise<Real, full>(args_, ch, begin, tokens, chunks_.count == 1, work.sums[c]);
        } else if (phase == Phase::write_y) {
            good = write_y<Real, full>(args_, ch, begin, tokens, work.sums[c], work.borders[c]);
        } else if (phase == Phase::summarise_adjoint) {
            if (chunks_.count == 1) return;
            summarise_adjoint<Real, full>(args_, ch, begin, tokens, work.sums[c], work.borders[c],
                                          work.adjoint_sums[c]);
        } else {
            good = write_gradients<Real, full>(args_, ch, begin, tokens, work.sums[c], work.borders[c],
                                               work.adjoint_borders[c], work.gw[c].x, work.gu[c].x);
        }
        if (all(good)) return;
        for (int i = 0; i < ch.count; ++i) {  // other chunks of the sequence may say the same at this moment
            if (!good[i]) __atomic_store_n(&redo_[sample * args_.channels + ch.first + i], 1, __ATOMIC_RELAXED);
        }
    }

    void reduce(const Channels<Real>& ch, int64_t sample, const Work<Real>& work) {
        for (int i = 0; i < ch.count; ++i) {
            double gw = 0, gu = 0;
            for (int64_t c = 0; c < chunks_.count; ++c) {
                gw += work.gw[c].x[i];
                gu += work.gu[c].x[i];
            }
            set_total(sample * args_.channels + ch.first + i, {gw, gu});
        }
    }

    void set_total(int64_t i, std::pair<double, double> gradients) {
        totals_[2 * i] = gradients.first;
        totals_[2 * i + 1] = gradients.second;
    }

    void redo_exactly() {
        std::vector<int64_t> list;
        for (int64_t i = 0; i < args_.batch * args_.channels; ++i) {
            if (redo_[i]) list.push_back(i);
        }
        at::parallel_for(0, static_cast<int64_t>(list.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j) {
                vision_rwkv::ExactChannel<Real> exact(args_, list[j] / args_.channels, list[j] % args_.channels);
                if (backward_) {
                    set_total(list[j], exact.backward());
                } else {
                    exact.forward();
                    exact.write_y();
                }
            }
        });
    }

    void sum_over_batch() {
        for (int64_t c = 0; c < args_.channels; ++c) {
            double gw = 0, gu = 0;
            for (int64_t i = c; i < args_.batch * args_.channels; i += args_.channels) {
                gw += totals_[2 * i];
                gu += totals_[2 * i + 1];
            }
            args_.gw[c] = static_cast<Real>(gw);
            args_.gu[c] = static_cast<Real>(gu);
        }
    }

    const Args<Real>& args_;
    const bool backward_;
    Chunks chunks_{};
    bool by_sequence_ = true;  // else phase by phase
    std::vector<Channels<Real>> channels_;
    std::vector<uint8_t> exact_;  // (C,)
    std::vector<uint8_t> redo_;   // (B, C) what the exact code computes again
    std::vector<double> totals_;  // (B, C, 2) gradients of w and u
};

template <typename Real>
void run(const Args<Real>& args, bool backward) {
    Run<Real> task(args, backward);
    task();
}
