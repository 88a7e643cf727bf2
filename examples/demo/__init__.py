"""The main job on the embedded default, proving itself: does the selected 5 % beat a random 5 %?"""
