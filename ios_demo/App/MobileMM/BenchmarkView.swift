import Charts
import MobileMMKit
import SwiftUI

struct BenchmarkView: View {
    let app: AppModel
    @State private var figures: [Figure] = []
    @State private var doing = ""
    @State private var failure = ""

    var body: some View {
        NavigationStack {
            List {
                Section {
                    Button(doing.isEmpty ? "Measure this bundle" : doing) { Task { await measure() } }
                        .disabled(!doing.isEmpty || app.bundle == nil || app.chat.isAnswering)
                    if !failure.isEmpty { Text(failure).foregroundStyle(.red) }
                }
                ForEach(["tok/s", "s", "B"], id: \.self) { unit in
                    let some = figures.filter { $0.unit == unit }
                    if !some.isEmpty {
                        Section(unit) {
                            Chart(some) { figure in
                                BarMark(x: .value(unit, figure.median), y: .value("figure", figure.name))
                            }
                            .frame(height: CGFloat(60 + 36 * some.count))
                            ForEach(some) { figure in
                                LabeledContent(figure.what, value: String(format: "%.4g %@", figure.median, unit))
                            }
                        }
                    }
                }
            }
            .navigationTitle("Benchmark")
        }
    }

    private func measure() async {
        guard let bundle = app.bundle, let backend = app.backend else { return }
        (figures, failure, doing) = ([], "", "Measuring…")
        do {
            figures = try await Benchmark(bundle, backend).run { what in
                Task { @MainActor in doing = what }
            }
        } catch {
            failure = oneLine(error)
        }
        doing = ""
    }
}
