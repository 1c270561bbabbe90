import MobileMMKit
import SwiftUI

struct CheckView: View {
    let app: AppModel
    @State private var checks: [Check] = []
    @State private var verdict = ""
    @State private var running = false

    var body: some View {
        NavigationStack {
            List {
                Section {
                    Button(running ? "Checking…" : "Check this bundle on this device") { Task { await check() } }
                        .disabled(running || app.backend == nil || app.chat.isAnswering)
                }
                ForEach(checks, id: \.text) { check in
                    Label {
                        VStack(alignment: .leading) {
                            Text(check.part).font(.headline)
                            Text(check.text).font(.footnote)
                        }
                    } icon: {
                        Image(systemName: check.passed ? "checkmark.circle.fill" : "xmark.octagon.fill")
                            .foregroundStyle(check.passed ? Color.green : Color.red)
                    }
                    .accessibilityElement(children: .combine)
                }
                if !verdict.isEmpty { Section("Verdict") { Text(verdict) } }
            }
            .navigationTitle("Self-check")
        }
    }

    private func check() async {
        guard let bundle = app.bundle, let backend = app.backend else { return }
        (checks, verdict, running) = ([], "", true)
        do {
            checks = try await SelfCheck(bundle, backend).run()
            let failed = checks.filter { !$0.passed }.map(\.part)
            verdict =
                failed.isEmpty
                ? "The bundle computes here what it computed when it was made."
                : "Do not trust its answers: \(failed.joined(separator: ", ")) differ. Import the bundle again."
        } catch {
            verdict = oneLine(error)
        }
        running = false
    }
}
