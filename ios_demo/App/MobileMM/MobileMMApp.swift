import SwiftUI

@main
struct MobileMMApp: App {
    @State private var model = AppModel.shared

    var body: some Scene {
        WindowGroup {
            TabView {
                ChatView(chat: model.chat)
                    .tabItem { Label("Chat", systemImage: "bubble.left.and.text.bubble.right") }
                ModelsView(app: model)
                    .tabItem { Label("Models", systemImage: "square.stack.3d.up") }
                BenchmarkView(app: model)
                    .tabItem { Label("Benchmark", systemImage: "gauge") }
                CheckView(app: model)
                    .tabItem { Label("Self-check", systemImage: "checkmark.seal") }
            }
            .task { await model.start() }
        }
    }
}
